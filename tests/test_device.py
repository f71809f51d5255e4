"""Device profiles: every number has a source, the models of time and energy are what they say."""

import copy
import dataclasses
import pickle

import pytest

from acclimate import device
from acclimate.errors import WrongUse

KINDS = ("datasheet:", "published:", "derived:", "definition:", "system:", "estimate:")
NAMES = ("stm32f4", "nano33ble", "rp2040", "esp32s3", "stm32f7", "stm32h7", "pi-zero2", "pi4", "host")


def numbers(d):
    """Names of all numeric fields, flags left out, and of the cycles a class of work."""
    fields = [f.name for f in dataclasses.fields(d) if type(getattr(d, f.name)) in (int, float)]
    return {*fields, *(f"cycles.{name}" for name in d.cycles)}


def test_all_profiles_are_listed():
    assert tuple(device.devices()) == NAMES
    assert all(device.get(name).name == name for name in NAMES)
    assert all(d.name == name for name, d in device.devices().items())


@pytest.mark.parametrize("name", NAMES)
def test_every_number_has_a_source(name):
    d = device.get(name)
    assert set(d.sources) == numbers(d)
    for field, text in d.sources.items():
        assert text.startswith(KINDS) and len(text) > 20, (field, text)
        assert field in d.explain() and text in d.explain()


@pytest.mark.parametrize("name", NAMES)
def test_profiles_are_consistent(name):
    d = device.get(name)
    assert set(d.cycles) == set(device.OP_CLASSES)
    assert 0 < d.usable_ram_bytes <= d.ram_bytes
    assert d.usable_ram_bytes == d.ram_bytes - d.reserve_bytes
    assert d.runtime_flash_bytes < d.flash_bytes and d.runtime_ram_bytes < d.usable_ram_bytes
    assert d.cycles["dw_mac"] >= d.cycles["mac"] and d.cycles["transcendental"] > d.cycles["elementwise"]
    assert d.threads >= 1 and d.active_power_w > 0
    assert d.has_fpu == (name != "rp2040")
    with pytest.raises(dataclasses.FrozenInstanceError):
        d.ram_bytes = 1


def test_the_boards_memory():
    assert device.get("nano33ble").ram_bytes == 256 * 1024
    assert device.get("nano33ble").flash_bytes == 1024 * 1024
    assert device.get("rp2040").ram_bytes == 264 * 1024
    assert device.get("stm32f7").ram_bytes == 320 * 1024


def test_latency_is_cycles_over_clock():
    d = device.get("nano33ble")
    counts = {"mac": 1000, "elementwise": 200, "transcendental": 10, "byte": 64, "call": 3, "dw_mac": 50}
    cycles = sum(units * d.cycles[name] for name, units in counts.items())
    assert d.latency_us(counts) == pytest.approx(cycles / 64.0)  # 64 cycles a microsecond
    assert d.latency_us({}) == 0
    assert d.energy_uj(counts) == pytest.approx(cycles / 64.0 * d.active_power_w)


def test_threads_share_the_work_but_not_the_calls():
    d = device.get("pi4")
    assert d.latency_us({"mac": 8e6}, threads=4) == pytest.approx(d.latency_us({"mac": 8e6}) / 4)
    assert d.latency_us({"mac": 8e6}, threads=64) == d.latency_us({"mac": 8e6}, threads=d.threads)
    assert d.latency_us({"call": 100}, threads=4) == d.latency_us({"call": 100})


def test_published_step_of_tiny_training_engine():
    """MCUNet's sparse step on an STM32F746 is published at 546 ms; its 49 KB scheme has 32.39 M MACs."""
    assert device.get("stm32f7").latency_us({"mac": 32.39e6}) == pytest.approx(546e3, rel=0.05)


def test_published_energy_is_net_power_times_time():
    """TBFT's twelve cells of joules follow from its seconds at 0.200 W (32 px) and 0.250 W (128 px)."""
    cells = {
        0.200: ((0.45, 0.090), (0.33, 0.066), (0.29, 0.058), (0.17, 0.034), (0.31, 0.062), (0.53, 0.106)),
        0.250: ((6.82, 1.705), (5.40, 1.350), (4.28, 1.070), (2.46, 0.615), (4.74, 1.185), (8.12, 2.030)),
    }
    for power_w, rows in cells.items():
        pi = dataclasses.replace(device.get("pi4"), active_power_w=power_w)
        for seconds, joules in rows:
            counts = {"mac": seconds * pi.clock_hz / pi.cycles["mac"]}
            assert pi.energy_uj(counts) / 1e6 == pytest.approx(joules, rel=0.02)


def test_calibration_replaces_estimates():
    d = device.get("stm32f4")
    counts = {"mac": 1e6, "call": 10}
    measured = d.calibrated(counts, 50_000.0, "board 7")
    assert measured.latency_us(counts) == pytest.approx(50_000.0)
    assert measured.cycles["dw_mac"] / measured.cycles["mac"] == pytest.approx(
        d.cycles["dw_mac"] / d.cycles["mac"]
    )
    assert (
        measured.sources["cycles.mac"].startswith("measured:") and "board 7" in measured.sources["cycles.mac"]
    )
    assert measured.sources["ram_bytes"] == d.sources["ram_bytes"]
    assert d is device.get("stm32f4") and d.cycles["mac"] == 5.0
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(WrongUse):
            d.calibrated(counts, bad)
    with pytest.raises(WrongUse):
        d.calibrated({}, 1.0)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("nano33", "nano33ble"),
        ("Nano 33 BLE", "nano33ble"),
        ("pizero2", "pi-zero2"),
        ("stm32f746", "stm32f7"),
        ("ESP32", "esp32s3"),
        ("rp-2040", "rp2040"),
    ],
)
def test_an_unknown_name_gets_the_nearest_one(wrong, right):
    with pytest.raises(WrongUse, match=f"did you mean {right}") as caught:
        device.get(wrong)
    assert all(name in str(caught.value) for name in NAMES)


@pytest.mark.parametrize("wrong", ["", "zzzzzz", "../etc", "π" * 50])
def test_a_far_name_gets_the_list(wrong):
    with pytest.raises(WrongUse) as caught:
        device.get(wrong)
    assert "did you mean" not in str(caught.value) and "nano33ble" in str(caught.value)
    assert caught.value.exit_code == 2


def test_unknown_work_is_refused():
    d = device.get("nano33ble")
    with pytest.raises(WrongUse, match="flops"):
        d.latency_us({"flops": 1})
    with pytest.raises(WrongUse):
        d.energy_uj({"macs": 1})
    with pytest.raises(WrongUse):
        d.latency_us({"mac": 1}, threads=0)


@pytest.mark.parametrize(
    "change",
    [
        {"cycles": {"mac": 1.0}},
        {"power_kind": "gross"},
        {"reserve_bytes": 256 * 1024},
        {"clock_hz": 0},
        {"cycles": dict.fromkeys(device.OP_CLASSES, -1.0)},
    ],
)
def test_a_profile_that_makes_no_sense_is_refused(change):
    with pytest.raises(WrongUse, match="nano33ble"):
        dataclasses.replace(device.get("nano33ble"), **change)


def test_profiles_copy_hash_and_pickle():
    d = device.get("pi4")
    assert copy.deepcopy(d) == d == pickle.loads(pickle.dumps(d))
    assert hash(d) == hash(copy.deepcopy(d))
    assert dataclasses.asdict(d)["cycles"] == d.cycles


def test_host_is_this_machine(monkeypatch):
    d = device.get("host")
    assert d.ram_bytes > 256 << 20 and d.clock_hz > 100e6
    monkeypatch.setattr(device, "_host_ram_bytes", lambda: 0)
    monkeypatch.setattr(device, "_host_clock_hz", lambda: 0)
    silent = device.get("host")
    assert silent.ram_bytes == 4 << 30 and silent.sources["ram_bytes"].startswith("estimate:")
    assert silent.sources["clock_hz"].startswith("estimate:")


def test_a_container_limits_the_host(monkeypatch, tmp_path):
    read = device.Path.read_text

    def limited(path, *args, **kwargs):
        return f"{512 << 20}\n" if str(path).endswith("memory.max") else read(path, *args, **kwargs)

    monkeypatch.setattr(device.Path, "read_text", limited)
    assert device.get("host").ram_bytes == 512 << 20
