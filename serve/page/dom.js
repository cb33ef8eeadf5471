// Elements from plain values. Whatever comes from users or models goes in as text, never as HTML.

/** An element with attributes (false and null leave one out, true sets it bare) and children: elements or text. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== false && value != null) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

/** The element with this id. */
export const byId = (id) => document.getElementById(id);

/** A number in about three digits. */
export function short(number) {
  if (number < 0) return `−${short(-number)}`;
  if (number === 0) return "0";
  if (number >= 99.95) return Math.round(number).toLocaleString("en");
  if (number >= 9.995) return number.toFixed(1);
  return number >= 0.005 ? number.toFixed(2) : number.toPrecision(1);
}

/** A probability as per cent; what is not quite 0 or 1 never looks as if it were. */
export function percent(probability) {
  if (probability > 0 && probability < 0.0005) return "< 0.1%";
  if (probability < 1 && probability >= 0.9995) return "> 99.9%";
  return `${(100 * probability).toFixed(1)}%`;
}
