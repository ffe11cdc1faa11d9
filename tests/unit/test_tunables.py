"""What may be changed while a disk is served, and in which words it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from vhostcache import tunables
from vhostcache.config import VolumeConfig, load
from vhostcache.errors import UsageError


def volume(folder: Path, cache: str = "cache: {path: c, size: 1GiB}") -> VolumeConfig:
    path = folder / "disks.yaml"
    path.write_text(f"volumes: [{{name: vda, socket: s, backend: {{path: i}}, {cache}}}]")
    return load(str(path)).volumes[0]


def test_settings_mean_what_they_mean_in_the_file(tmp_path: Path) -> None:
    wanted = {"destage": False, "destage_after": "1min", "sync_interval": 2, "destage_threshold": 30}
    config, values = tunables.changed(volume(tmp_path), wanted)
    assert values == {
        "destage": False,
        "destage_after": 60 * 10**9,
        "sync_interval": 2 * 10**9,
        "destage_threshold": 30,
    }
    assert config.cache.destage is False
    assert tunables.current(config) == {
        "destage_after": 60.0,
        "destage_threshold": 30,
        "max_batched_objects": 8,
        "destage": False,
        "sync_interval": 2.0,
        "checkpoint_interval": 60.0,
    }


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "nothing is to be set"),
        ({"destage_treshold": 30}, "did you mean 'destage_threshold'?"),
        ({"ram": "1GiB"}, "'ram' cannot be set"),
        ({"destage": 1}, "destage: found '1'; allowed: on, off"),
        ({"destage_threshold": 95}, "found '95'; allowed: a percentage from 0 to 90"),
        ({"sync_interval": "soon"}, "found 'soon'; not a duration; allowed: a duration from 1ms"),
        ({"max_batched_objects": [1]}, "found a list"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, values: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        tunables.changed(volume(tmp_path), values)
    assert said in str(caught.value)
    assert str(caught.value).startswith("volume 'vda': ")


def test_without_a_cache_file_only_the_age_can_be_set(tmp_path: Path) -> None:
    config = volume(tmp_path, "ram: 64MiB")
    assert tunables.current(config) == {"destage_after": 5.0}
    assert tunables.changed(config, {"destage_after": 1})[1] == {"destage_after": 10**9}
    with pytest.raises(UsageError, match="of no use without a cache file"):
        tunables.changed(config, {"destage": True})
