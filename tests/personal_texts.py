"""Sentences with personal data in them, and sentences that only look so: what recognizers are measured on.

The data is drawn from a seed and belongs to nobody, but has the right check digits. Numbers and accounts are built
here, not by the libraries that look for them.
"""

import ipaddress
import random
import string
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Made:
    """A sentence and what should become of it."""

    text: str
    expected: str
    kind: str
    """Of the datum in it; empty where there is none."""
    datum: str = ""
    unusual: bool = False


def made(count: int, seed: int = 0, *, unusual: bool = False) -> list[Made]:
    """`count` sentences for each kind, in turns through its forms (or its unusual ones), languages and sentences."""
    draw = random.Random(seed)
    found = []
    for kind, forms in (UNUSUAL if unusual else FORMS).items():
        for number in range(count):
            datum = _dressed(forms[number % len(forms)](draw), draw)
            frame = draw.choice(SENTENCES[kind])
            tag = f"[{kind.upper()}]"
            found.append(Made(frame.format(datum), frame.format(tag), kind, datum, unusual))
    return found


def negatives(count: int, seed: int = 0) -> list[Made]:
    """`count` sentences without personal data, each with something that looks a little like it."""
    draw = random.Random(seed)
    texts = [NEGATIVES[number % len(NEGATIVES)](draw) for number in range(count)]
    return [Made(text, text, "") for text in texts]


def _digits(draw: random.Random, count: int) -> str:
    return "".join(draw.choices(string.digits, k=count))


def _filled(draw: random.Random, form: str) -> str:
    """The form with a digit for each #, and one from 2 to 9 for each N."""
    return "".join(
        draw.choice("23456789") if sign == "N" else draw.choice(string.digits) if sign == "#" else sign for sign in form
    )


def _form(form: str) -> Callable[[random.Random], str]:
    return lambda draw: _filled(draw, form)


def _dressed(datum: str, draw: random.Random) -> str:
    """Now and then as it comes out of other keyboards: other widths, spaces, hyphens, with marks of direction."""
    match draw.randrange(12):
        case 0:
            return datum.translate({ord(sign): chr(ord(sign) + 0xFEE0) for sign in string.digits})
        case 1:
            return datum.replace(" ", "\u00a0").replace("-", "\u2011")
        case 2:
            return datum.replace(" ", "\u202f").replace("-", "\u2013")
        case _:
            return datum


def _email(draw: random.Random) -> str:
    first = draw.choice(
        ["anna", "j.smith", "li.wei", "o.garcia+news", "max_mustermann", "k-tanaka", "m.dupont", "sara99"]
    )
    host = draw.choice(
        ["example.com", "mail.example.org", "firma.de", "univ-lyon.fr", "bufete.es", "corp.co.uk", "qq.com"]
    )
    return f"{first}@{host}"


def luhn_digit(payload: str) -> str:
    """The check digit of a card's other digits."""
    total = 0
    for position, sign in enumerate(reversed(payload)):
        doubled = int(sign) * (2 if position % 2 == 0 else 1)
        total += doubled - 9 if doubled > 9 else doubled
    return str(-total % 10)


def _card(draw: random.Random, prefix: str, size: int) -> str:
    payload = prefix + _digits(draw, size - len(prefix) - 1)
    return payload + luhn_digit(payload)


def _grouped(number: str, sizes: tuple[int, ...], separator: str) -> str:
    groups, start = [], 0
    for size in sizes:
        groups.append(number[start : start + size])
        start += size
    return separator.join(groups)


def _iban(draw: random.Random) -> str:
    country, form = draw.choice(
        [
            ("DE", "##################"),
            ("FR", "#######################"),
            ("GB", "WEST##############"),
            ("ES", "####################"),
            ("NL", "RABO##########"),
            ("CH", "#################"),
            ("PL", "########################"),
            ("SE", "####################"),
        ]
    )
    account = _filled(draw, form)
    value = int("".join(str(int(sign, 36)) for sign in account + country + "00"))
    return f"{country}{98 - value % 97:02d}{account}"


def _iban_grouped(draw: random.Random) -> str:
    number = _iban(draw)
    return " ".join(number[start : start + 4] for start in range(0, len(number), 4))


def chinese_id(draw: random.Random) -> str:
    """A number of an identity card."""
    place = draw.choice(["110101", "310115", "440305", "510104", "330106", "420111"])
    day = f"{draw.randint(1940, 2010)}{draw.randint(1, 12):02d}{draw.randint(1, 28):02d}"
    payload = place + day + _digits(draw, 3)
    weights = [7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2]
    return payload + "10X98765432"[sum(int(sign) * weight for sign, weight in zip(payload, weights, strict=True)) % 11]


def _ssn(draw: random.Random) -> str:
    return f"{draw.randint(1, 665):03d}-{draw.randint(1, 99):02d}-{draw.randint(1, 9999):04d}"


def _ipv4(draw: random.Random) -> str:
    return ".".join(map(str, [draw.choice([10, 24, 81, 93, 172, 192, 203]), *draw.choices(range(255), k=3)]))


def _ipv6(draw: random.Random) -> str:
    address = ipaddress.IPv6Address((0x2001_0DB8 << 96) + draw.getrandbits(80))
    return draw.choice([address.compressed, address.exploded])


FORMS: dict[str, list[Callable[[random.Random], str]]] = {
    "email": [_email, _email, lambda draw: _email(draw).upper(), lambda draw: _email(draw).replace("anna", "jürgen")],
    "phone": [
        _form("+1 415 NNN ####"),
        _form("+1 (212) NNN-####"),
        _form("(312) NNN-####"),
        _form("206-NNN-####"),
        _form("305.NNN.####"),
        _form("1-646-NNN-####"),
        _form("713NNN####"),
        _form("+44 20 7946 0###"),
        _form("07700 900###"),
        _form("0161 496 0###"),
        _form("+49 30 N#######"),
        _form("+49 (0)171 N######"),
        _form("030/N######"),
        _form("0171 N######"),
        _form("089 N### ####"),
        _form("+33 6 1# ## ## ##"),
        _form("06 2# ## ## ##"),
        _form("01.42.N#.##.##"),
        _form("138########"),
        _form("139 #### ####"),
        _form("+86 186 #### ####"),
        _form("010-6NNN ####"),
        _form("+34 61# ## ## ##"),
        _form("+81 90-N###-####"),
        _form("+55 11 9N###-####"),
        _form("+91 98### #####"),
        _form("+7 (916) N##-##-##"),
        _form("+972 50-N##-####"),
        _form("0049 30 N######"),
    ],
    "card": [
        lambda draw: _card(draw, "4", 16),
        lambda draw: _grouped(_card(draw, "4", 16), (4, 4, 4, 4), " "),
        lambda draw: _grouped(_card(draw, "53", 16), (4, 4, 4, 4), "-"),
        lambda draw: _grouped(_card(draw, "37", 15), (4, 6, 5), " "),
        lambda draw: _card(draw, "62", 19),
        lambda draw: _grouped(_card(draw, "6011", 16), (4, 4, 4, 4), " "),
        lambda draw: _grouped(_card(draw, "36", 14), (4, 6, 4), " "),
    ],
    "iban": [_iban, _iban_grouped, _iban_grouped, lambda draw: _iban(draw).lower()],
    "ip": [_ipv4, _ipv4, _ipv6],
    "us_ssn": [_ssn],
    "cn_id": [
        chinese_id,
        lambda draw: chinese_id(draw).lower(),
        lambda draw: _grouped(chinese_id(draw), (6, 8, 4), " "),
    ],
}

UNUSUAL: dict[str, list[Callable[[random.Random], str]]] = {
    "email": [
        lambda draw: f"mailto:{_email(draw)}?subject=hi",
        lambda draw: f"user={_email(draw)}&x=1",
        lambda draw: _email(draw).replace("@", " @ "),
        lambda draw: _email(draw).replace("@", "(at)"),
        lambda draw: _email(draw).replace("anna", "анна"),
        lambda draw: f'"john doe"@{_email(draw).split("@")[1]}',
        lambda draw: f"用户@{_email(draw).split('@')[1]}",
        lambda draw: f"{_email(draw)}.",
    ],
    "phone": [
        _form("+1.415.NNN.####"),
        _form("1 (800) NNN ####"),
        _form("212 NNN####"),
        _form("212/NNN-####"),
        _form("+1 212 NNN #### x45"),
        _form("tel-212NNN####"),
        _form("NNN-####"),
        _form("+44(0)20 7946 0###"),
        _form("0044-20-7946-0###"),
        _form("(0)20 7946 0###"),
        _form("+49/30/N######"),
        _form("030 - N## ## ##"),
        _form("030-N######"),
        _form("+33 (0)6 1# ## ## ##"),
        _form("06-2#-##-##-##"),
        _form("062#######"),
        _form("138-####-####"),
        _form("+86-138-####-####"),
        _form("86 138########"),
        _form("08-123 45# ##"),  # in Sweden
        _form("0412 3## ###"),  # in Australia
        _form("03-N###-####"),  # in Japan
    ],
    "card": [
        lambda draw: _grouped(_card(draw, "4", 16), (4, 4, 4, 4), "."),
        lambda draw: _grouped(_card(draw, "4", 16), (4, 4, 4, 4), "  "),
        lambda draw: _grouped(_card(draw, "53", 16), (4, 4, 4, 4), " - "),
        lambda draw: _grouped(_card(draw, "53", 16), (8, 8), " "),
        lambda draw: _grouped(_card(draw, "37", 15), (4, 4, 4, 3), " "),
        lambda draw: f"visa{_card(draw, '4', 16)}",
    ],
    "iban": [
        lambda draw: _iban_grouped(draw).replace(" ", "-"),
        lambda draw: f"IBAN{_iban(draw)}",
        lambda draw: f"{(iban := _iban(draw))[:2]} {iban[2:4]} {iban[4:]}",
        lambda draw: _iban_grouped(draw).lower(),
    ],
    "ip": [
        lambda draw: f"[{_ipv6(draw)}]:443",
        lambda draw: f"{_ipv4(draw)}/24",
        lambda draw: f"::ffff:{_ipv4(draw)}",
        lambda draw: f"fe80::{draw.randrange(16**4):x}:{draw.randrange(16**4):x}%eth0",
    ],
    "us_ssn": [
        lambda draw: _ssn(draw).replace("-", " "),
        lambda draw: _ssn(draw).replace("-", ""),
        lambda draw: _ssn(draw).replace("-", "."),
    ],
    "cn_id": [
        lambda draw: f"ID{chinese_id(draw)}",
        lambda draw: _grouped(chinese_id(draw), (3, 3, 4, 4, 4), " "),
        lambda draw: _grouped(chinese_id(draw), (6, 8, 4), "-"),
    ],
}
"""As people write it now and then. Of some only a part is the datum, so how much is masked cannot be told exactly."""

SENTENCES: dict[str, list[str]] = {
    "email": [
        "Please write to {} before Friday.",
        "My address is {}, thanks!",
        "Schreiben Sie mir an {}.",
        "mail:{}",
        "Mon adresse : {} (perso)",
        "请发邮件到{}谢谢",
        "メールは{}です",
        "اكتب إلى {} من فضلك",
        "<{}>",
        "Contacto: {}; gracias",
        "@united lost my bag, email me {}",
    ],
    "phone": [
        "Call me at {} after 6 pm.",
        "My number is {}, please ring back!",
        "Rufen Sie mich unter {} an.",
        "Tél. {} merci",
        "Mi teléfono: {}.",
        "我的电话是{}请回电",
        "電話は{}です",
        "הטלפון שלי הוא \u200e{}\u200e תודה",
        "رقمي هو \u202a{}\u202c شكرا",
        "Телефон {} звоните",
        "WhatsApp ({})",
        "@JetBlue still waiting, {} #fail",
    ],
    "card": [
        "I paid with {} last week.",
        "Karte {} wurde doppelt belastet",
        "Ma carte {} est bloquée.",
        "卡号{}被盗刷",
        "card no. {}, exp 04/27, cvv 123",
        "Refund it to {}!",
    ],
    "iban": [
        "Send it to {} please.",
        "IBAN: {}",
        "Bitte auf {} überweisen.",
        "Virement sur {} merci",
        "Mi cuenta es {}, gracias",
        "账户{}请查收",
    ],
    "ip": [
        "My router has {} since Monday.",
        "blocked from {}",
        "Zugriff von {}, bitte prüfen.",
        "login from {} at 12:30",
        "地址{}无法访问",
        "({})",
    ],
    "us_ssn": ["My SSN is {}.", "SSN: {}", "social security {} and born in May", "Here it is, {}!", "编号{}"],
    "cn_id": ["我的身份证号是{}。", "身份证{}", "ID {} please check", "证件号码 {} 已登记"],
}

NEGATIVES: list[Callable[[random.Random], str]] = [
    _form("Order 11#-#######-####### has not arrived"),
    _form("order no. 8########### is late"),
    _form("My ticket number is #############"),
    _form("Bestellung Nr. 4##-####-## fehlt"),
    _form("Rechnung 2024-####### vom 0N.12.2023"),
    _form("flight UA#### from SFO to DEN, seat 14C"),
    _form("Flug LH 4## am 12.03.2024 um 14:35"),
    _form("confirmation FP9M6Y, row #N"),
    _form("It cost $1,#N#.## and then €2.#N#,##"),
    _form("Rp 1.2##.### or 1 2## ### kr"),
    _form("that is 12,#N#,### people and 3.1415926###"),
    _form("on 2024-0N-1# at 08:##:## they called"),
    _form("2023/0N/1#, 1#.0N.2023, 0N-1#-23"),
    _form("upgrade to version 2.4.#.# now"),
    _form("v10.1.#.# broke it, 10.15.7 did not"),
    _form("#fail #2024 #Flight#### @united_### @user##"),
    _form("@JetBlue @AmericanAir: see @ 5pm, 2@3 for $#"),
    _form("https://t.co/aB3dE#F and https://x.com/i/status/17################"),
    _form("ISBN 978-3-16-1484##-#"),
    _form("EAN 40########### on the box"),
    _form("std::vector and a::b at 10:##:##"),
    _form("MAC 00:1B:44:11:3A:B#"),
    _form("550e8400-e29b-41d4-a716-44665544####"),
    _form("Score 3-2, 21:15, 25:23, 10 000 m in 26:11.##"),
    _form("pages 123-145, §§ 12.3.4, chapter 1.2.3"),
    _form("ratio 1:100000, 0.000####, 1e-##"),
    _form("ZIP 90210-####, 75008 Paris, 100 000 km"),
    _form("航班CA#### 价格1,2##元 2024年3月1#日"),
    _form("订单号2024############请查询"),
    _form("part no. AB-###-#### and model X##-##"),
    _form("127.0.0.1:80## and :: are nobody's"),
    _form("case #00######## is still open"),
    _form("tracking 1Z999AA1012345####"),
    _form("1 2 3 4 5 6 7 8 9 10 11 12 13 1#"),
    _form("years 2019 2020 2021 202# were bad"),
    _form("47.3### N, 8.5### E"),
    _form("I waited 45 min, 2 hrs, then 3## more"),
]
