"""cluster.yaml is what Ray takes, and starts Ray as Shoal needs it."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.connect import ENVIRONMENT

FILE = Path("cluster.yaml")


@pytest.fixture(scope="module")
def config() -> Any:
    return prepare_config(yaml.safe_load(FILE.read_text()))


def test_rays_schema_accepts_it(config: Any) -> None:
    validate_config(config)


def test_the_head_takes_no_work_and_gpus_are_spot(config: Any) -> None:
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"]["CPU"] == 0
    assert types["gpu"]["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert "InstanceMarketOptions" not in types["head"]["node_config"]
    assert all(types[name]["min_workers"] == 0 < types[name]["max_workers"] for name in ("cpu", "gpu"))


def test_every_node_has_the_environment_that_connect_sets(config: Any) -> None:
    written = "\n".join(config["setup_commands"])
    assert dict(re.findall(r"export (\w+)=(\S+)$", written, re.M)) == ENVIRONMENT
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert re.search(r"\. ~/shoal\.env;.*ray start", config[name][-1], re.S)


def test_every_node_is_set_up_from_the_lock(config: Any) -> None:
    assert "make -C ~/shoal setup" in config["setup_commands"]
    assert re.search(r"^ray==2\.60\.\d+$", Path("requirements.lock").read_text(), re.M)
    assert re.search(r"^boto3==", Path("requirements.lock").read_text(), re.M)
