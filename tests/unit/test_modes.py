import itertools

import pytest

from vhostcache.modes import DEFAULT, MODES, Mode, resolve

# QEMU's documentation of -drive cache=: writeback, direct, no-flush.
QEMU = {
    "writeback": (True, False, False),
    "none": (True, True, False),
    "writethrough": (False, False, False),
    "directsync": (False, True, False),
    "unsafe": (True, False, True),
}


@pytest.mark.parametrize(("name", "parts"), QEMU.items())
def test_a_mode_stands_for_the_parts_that_qemu_gives_it(name: str, parts: tuple[bool, bool, bool]) -> None:
    assert resolve(name) == Mode(*parts)
    assert resolve(name).name == name


def test_these_are_all_modes_and_none_is_the_default() -> None:
    assert set(MODES) == set(QEMU)
    assert DEFAULT == "none"


@pytest.mark.parametrize("parts", list(itertools.product([False, True], repeat=3)))
def test_any_combination_can_be_asked_for_by_its_parts(parts: tuple[bool, bool, bool]) -> None:
    for name in MODES:
        assert resolve(name, *parts) == Mode(*parts)


def test_a_part_that_is_not_given_stays_as_the_mode_has_it() -> None:
    assert resolve("none", no_flush=True) == Mode(writeback=True, direct=True, no_flush=True)
    assert resolve("writethrough", direct=True).name == "directsync"


def test_a_combination_without_a_name_is_spelt_as_qemu_spells_its_parts() -> None:
    assert resolve("none", no_flush=True).name == "cache.writeback=on,cache.direct=on,cache.no-flush=on"


def test_an_unknown_mode_is_no_mode() -> None:
    with pytest.raises(KeyError):
        resolve("writebak")
