"""Platform files: those edgert ships, and what is said of a bad one."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from edgert.platforms.board import Platform
from edgert.platforms.board_file import load_platform, platforms, read_platform
from edgert.platforms.fields import CLOCK, RATE, SIZE, PlatformError, Unit

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHIPPED = platforms()
GOOD = """
name = "my-board"
title = "My board"
default_mode = "slow"
features = { value = ["asimd", "asimddp"], source = "sheet" }

[detect]
compatible = ["acme,board*"]

[sources]
sheet = "Acme board data sheet"

[[clusters]]
part = "Cortex-A76"
cpu_part = "0xD0B"
cores = 4
clock = { value = "2.4 GHz", source = "estimate: as the Pi" }
int8_per_cycle = 64
fp32_per_cycle = 16
source = "sheet"

[[caches]]
level = 2
kind = "unified"
instances = 4
size = "512 KiB"
source = "sheet"

[memory]
kind = "LPDDR4X"
peak = "17.1 GB/s"
sustained = { value = "11 GB/s", source = "derived: 0.64 of the peak" }
clock = "2 GHz"
source = "sheet"
options = [{ total = "4 GiB", usable = "3.5 GiB" }, { total = "8 GiB", usable = "7.5 GiB" }]

[[storage]]
kind = "nvme"
link = "PCIe 2.0 x1"
rate = "500 MB/s"
source = "sheet"
reads = [
    { request = "16 KiB", depth_1 = "190 MB/s", deep = "450 MB/s" },
    { request = "1 MiB", depth_1 = "440 MB/s", deep = "450 MB/s" },
]

[[modes]]
name = "slow"
cores = 2
clock = "1.2 GHz"
memory_clock = "1 GHz"
source = "sheet"
"""

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_file(text: str) -> Path:
        path = tmp_path / "my.toml"
        path.write_text(text)
        return path

    return to_file


# What is shipped.


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_file(name: str) -> None:
    board = load_platform(name)
    assert board.name == name and board.title
    assert board.int8_ops >= 2 * board.fp32_ops > 0
    assert {c.level for c in board.caches} >= {1, 2}
    assert [c.clock for c in board.clusters] == sorted((c.clock for c in board.clusters), reverse=True)
    for storage in board.storage:
        assert (storage.reads[0].request, storage.reads[-1].request) == (16 << 10, 1 << 20)
    for mode in board.modes:
        clamped = board.in_mode(mode.name)
        assert clamped.cores == mode.cores and clamped.memory.sustained <= board.memory.sustained


@pytest.mark.parametrize("name", SHIPPED)
def test_every_figure_of_a_shipped_file_has_a_source(name: str) -> None:
    """Walks the file itself, not what the loader made of it; every document listed is used."""
    board = load_platform(name)
    data = tomllib.loads(Path(board.path).read_text())
    documents = data.pop("sources")
    used: set[str] = set()
    assert list(without_source(data, False, used)) == []
    assert set(documents) <= used
    assert all(len(source) > len("derived: ") for source in board.sources.values())


def without_source(node: object, sourced: bool, used: set[str]) -> Iterator[object]:
    """The figures below ``node`` that have no source; adds every source met to ``used``."""
    if isinstance(node, dict):
        if "source" in node:
            used.add(node["source"])
        for key, value in node.items():
            if key != "source":
                yield from without_source(value, sourced or "source" in node, used)
    elif isinstance(node, list):
        for value in node:
            yield from without_source(value, sourced, used)
    elif not isinstance(node, bool):
        quantity = isinstance(node, str) and re.fullmatch(r"[0-9.]+ [A-Za-z/]+", node)
        if (quantity or isinstance(node, (int, float))) and not sourced:
            yield node


def test_what_the_project_promises_to_describe() -> None:
    asked = """jetson-orin-nano-4gb jetson-orin-nano-8gb jetson-orin-nx-8gb jetson-orin-nx-16gb
    jetson-agx-orin-32gb jetson-agx-orin-64gb jetson-thor-t5000 raspberry-pi-5 rk3588 apple-m1 apple-m2
    apple-m3 apple-m4 x86-laptop-ddr4 x86-laptop-ddr5 x86-laptop-lpddr5x"""
    assert sorted(asked.split()) == SHIPPED


def test_no_alias_means_two_boards() -> None:
    names = [name for stem in SHIPPED for name in (stem, *load_platform(stem).aliases)]
    assert sorted(names) == sorted(set(names))


def test_peak_of_the_jetsons_follows_from_the_memory_clock() -> None:
    for name in SHIPPED:
        memory = load_platform(name).memory
        if bits := re.search(r"(\d+)-bit", memory.kind):
            if memory.clock:
                assert memory.peak == pytest.approx(memory.clock * 2 * int(bits[1]) / 8, rel=0.01), name
            if rate := re.search(r"-(\d{4})", memory.kind):
                assert memory.peak == pytest.approx(int(rate[1]) * 1e6 * int(bits[1]) / 8, rel=0.01), name


# Power modes and memory sizes.


def test_orin_nano_super_by_power_mode() -> None:
    board = load_platform("orin-nano-super")
    slow, default, fast = (board.in_mode(name) for name in ("15W", "25W", "maxn_super"))
    assert (slow.cores, slow.clusters[0].clock) == (6, 1_497_600_000)
    assert slow.memory.peak == pytest.approx(68.3e9, rel=0.001)
    # 25W takes from the processor what it gives to the memory.
    assert default.int8_ops < slow.int8_ops and default.memory.peak == 102_400_000_000
    assert fast.clusters == board.clusters and fast.memory == board.memory
    assert board.in_mode("7W").cores == 4
    assert board.default_mode == "25W"


def test_nvidia_names_of_modes() -> None:
    assert load_platform("agx-orin").mode("MODE_30W").name == "30W"


def test_unknown_mode_names_the_nearest() -> None:
    with pytest.raises(PlatformError, match=r"no power mode 'MAXN'.*did you mean 'MAXN_SUPER'\?"):
        load_platform("orin-nano").mode("MAXN")
    with pytest.raises(PlatformError, match="has none"):
        load_platform("raspberry-pi-5").in_mode("15W")


def test_cores_that_stay_on_are_the_fastest(write: Write) -> None:
    slow = """
    [[clusters]]
    part = "Cortex-A55"
    cores = 4
    clock = "1.8 GHz"
    int8_per_cycle = 32
    fp32_per_cycle = 8
    source = "sheet"
    """
    board = read_platform(write(GOOD.replace("\n[[caches]]", slow + "\n[[caches]]"))).in_mode("slow")
    assert [(c.part, c.cores, c.clock) for c in board.clusters] == [("Cortex-A76", 2, 1_200_000_000)]


@pytest.mark.parametrize(
    ("name", "gib"), [("raspberry-pi-5", 8), ("Raspberry_Pi 5-16GB", 16), ("pi5-4gb", 4)]
)
def test_memory_size_in_the_name(name: str, gib: int) -> None:
    memory = load_platform(name).memory
    assert memory.total == gib << 30 and 0.8 * memory.total < memory.usable < memory.total


def test_memory_size_by_what_the_system_reports() -> None:
    board = load_platform("raspberry-pi-5")
    totals = [board.with_memory(reported).memory.total >> 30 for reported in (1 << 30, 8 << 30, 99 << 30)]
    assert totals == [4, 8, 16]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("raspbery-pi-5", "did you mean 'raspberry-pi-5'?"),
        ("orin nano supper", "did you mean 'orin-nano-super'?"),
        ("raspberry-pi-5-6gb", "did you mean 'raspberry-pi-5-16gb'?"),
        ("zzz", "known are apple-m1, "),
        ("", "unknown platform ''"),
        ("../secret", "unknown platform"),
    ],
)
def test_unknown_name(name: str, said: str) -> None:
    with pytest.raises(PlatformError) as caught:
        load_platform(name)
    assert said in str(caught.value)


# A file of the user's own.


def test_own_file(write: Write) -> None:
    board = read_platform(write(GOOD))
    assert board.cores == 4 and board.int8_ops == 4 * 2.4e9 * 64
    assert board.clusters[0].cpu_part == "0xd0b"
    assert board.memory.total == 4 << 30 and board.caches[0].nbytes == 2 << 20
    assert board.sources["memory.options[1].usable"] == "Acme board data sheet"
    assert board.sources["clusters[0].clock"] == "estimate: as the Pi"
    assert board.is_measured("memory.peak") and not board.is_measured("memory.sustained")


def test_least_file(write: Write) -> None:
    text = GOOD
    for part in ("default_mode", "[detect]", "[[caches]]", "[[storage]]", "[[modes]]"):
        text = re.sub(
            rf"^{re.escape(part)}[^\n]*\n" + (r"(?:.+\n)*" if part[0] == "[" else ""), "", text, flags=re.M
        )
    board = read_platform(write(text))
    assert isinstance(board, Platform) and board.modes == board.storage == board.caches == ()


@pytest.mark.parametrize(
    ("old", "new", "field", "said"),
    [
        # missing
        ('name = "my-board"\n', "", "name", "missing"),
        ('peak = "17.1 GB/s"\n', "", "memory.peak", "missing"),
        ("cores = 4\n", "", "clusters[0].cores", "missing"),
        (
            '{ total = "4 GiB", usable = "3.5 GiB" }',
            '{ total = "4 GiB" }',
            "memory.options[0].usable",
            "missing",
        ),
        ("[memory]", "[memroy]", "memory", "expected a table, found 'nothing'"),
        ("[[clusters]]", "[[cluster]]", "clusters", "missing"),
        # types and units
        ("cores = 4\n", 'cores = "4"\n', "clusters[0].cores", "expected a whole number, found '4'"),
        ("cores = 4\n", "cores = true\n", "clusters[0].cores", "expected a whole number"),
        ("cores = 4\n", "cores = 4.0\n", "clusters[0].cores", "expected a whole number"),
        ('"17.1 GB/s"', '"17.1 GB"', "memory.peak", "expected a rate such as '25.6 GB/s', found '17.1 GB'"),
        ('"17.1 GB/s"', "17.1", "memory.peak", "found 17.1"),
        ('"17.1 GB/s"', '"17.1 GHz"', "memory.peak", "expected a rate"),
        ('"512 KiB"', '"512 kb"', "caches[0].size", "expected a size such as '8 GiB'"),
        ('"1.2 GHz"', '"1.2 GiHz"', "modes[0].clock", "expected a frequency"),
        ('"My board"', "7", "title", "expected text"),
        ('["acme,board*"]', '"acme"', "detect.compatible", "expected a list of text"),
        ("int8_per_cycle = 64", 'int8_per_cycle = "64"', "clusters[0].int8_per_cycle", "expected a number"),
        ("[detect]\n", "[detect]\nfallback = 1\n", "detect.fallback", "expected true or false"),
        ("[[modes]]", "[modes]", "modes", "expected a list of tables"),
        ('sheet = "Acme board data sheet"', "sheet = 1", "sources", "expected a table of documents"),
        # absurd
        ("cores = 4\n", "cores = -4\n", "clusters[0].cores", "-4 is absurd"),
        ("cores = 4\n", "cores = 0\n", "clusters[0].cores", "0 is absurd"),
        ('"17.1 GB/s"', '"-17.1 GB/s"', "memory.peak", "expected a rate"),
        ('"17.1 GB/s"', '"nan GB/s"', "memory.peak", "expected a rate"),
        ('"17.1 GB/s"', '"99999 TB/s"', "memory.peak", "absurd for a rate"),
        ('"2.4 GHz"', '"2.4 Hz"', "clusters[0].clock", "absurd for a frequency"),
        ("int8_per_cycle = 64", "int8_per_cycle = nan", "clusters[0].int8_per_cycle", "nan is absurd"),
        ("int8_per_cycle = 64", "int8_per_cycle = inf", "clusters[0].int8_per_cycle", "inf is absurd"),
        ("int8_per_cycle = 64", "int8_per_cycle = -1", "clusters[0].int8_per_cycle", "-1 is absurd"),
        ('"11 GB/s"', '"18 GB/s"', "memory.sustained", "above the peak of 17.1 GB/s"),
        ('"3.5 GiB"', '"4.5 GiB"', "memory.options[0].usable", "more than the total"),
        ("cores = 2\n", "cores = 5\n", "modes[0].cores", "more than the 4 of the clusters"),
        ('"1.2 GHz"', '"2.5 GHz"', "modes[0].clock", "above the 2400 MHz"),
        ('"1 GHz"', '"3 GHz"', "modes[0].memory_clock", "above memory.clock"),
        ('clock = "2 GHz"\n', "", "modes[0].memory_clock", "needs memory.clock"),
        (
            '"190 MB/s", deep = "450 MB/s"',
            '"190 MB/s", deep = "501 MB/s"',
            "storage[0].reads[0].deep",
            "above the link's 500 MB/s",
        ),
        ('"190 MB/s"', '"460 MB/s"', "storage[0].reads[0].depth_1", "above the 450 MB/s"),
        ('"1 MiB"', '"8 KiB"', "storage[0].reads[1].request", "must grow"),
        # unknown words
        ("[detect]", '[detect]\ncompatable = ["x"]', "detect.compatable", "did you mean 'compatible'?"),
        ('clock = "2 GHz"', 'clok = "2 GHz"', "memory.clok", "unknown key; did you mean 'clock'?"),
        ('title = "My board"', 'title = "My board"\nzzzz = 1', "zzzz", "unknown key"),
        ('"asimddp"]', '"asimd_dp"]', "features", "unknown 'asimd_dp'; did you mean 'asimddp'?"),
        ('"nvme"', '"floppy"', "storage[0].kind", "expected one of nvme, emmc, sd, ufs, sata"),
        ('default_mode = "slow"', 'default_mode = "fast"', "default_mode", "'fast' is none of the modes"),
        # sources
        (
            'value = "2.4 GHz", source = "estimate: as the Pi"',
            'value = "2.4 GHz"',
            "clusters[0].clock",
            "a figure is",
        ),
        ('"estimate: as the Pi"', '"shet"', "clusters[0].clock", "did you mean 'sheet'?"),
        ('"estimate: as the Pi"', '"estimate: "', "clusters[0].clock", "no key of [sources]"),
        ('"estimate: as the Pi"', "3", "clusters[0].clock", "source 3 is no key"),
        ('"estimate: as the Pi" }', '"sheet", sorce = "x" }', "clusters[0].clock", "a figure is"),
        (
            'size = "512 KiB"\nsource = "sheet"',
            'size = "512 KiB"',
            "caches[0].level",
            "no source for this figure",
        ),
    ],
)
def test_bad_file(write: Write, old: str, new: str, field: str, said: str) -> None:
    assert old in GOOD
    path = write(GOOD.replace(old, new, 1))
    with pytest.raises(PlatformError) as caught:
        read_platform(path)
    assert caught.value.field == field
    assert caught.value.path == str(path) and str(path) in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize("content", [b"name = ", b"\xff\xfe", b"a = 1\na = 2"])
def test_no_toml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "my.toml"
    path.write_bytes(content)
    with pytest.raises(PlatformError, match="cannot be read"):
        read_platform(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(PlatformError, match="cannot be read"):
        read_platform(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("unit", "text", "base"),
    [
        (SIZE, "8 GiB", 8 << 30),
        (SIZE, "8 GB", 8_000_000_000),
        (SIZE, "64KiB", 64 << 10),
        (SIZE, "512 B", 512),
        (RATE, "2 MiB/s", 2 << 20),
        (RATE, "25.6 GB/s", 25_600_000_000),
        (CLOCK, "1497.6 MHz", 1_497_600_000),
    ],
)
def test_units(unit: Unit, text: str, base: int) -> None:
    assert unit(text) == base


def test_example_of_the_documentation(write: Write) -> None:
    text = (Path(__file__).parent.parent / "docs/platforms.md").read_text()
    board = read_platform(write(text.split("```toml\n")[1].split("```")[0]))
    assert board.in_mode("15W").memory.peak == pytest.approx(17.1e9 * 1066 / 2133)
