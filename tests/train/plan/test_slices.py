"""Names of slices, prices, and the comparison of several slices."""

import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_fast.cli.main import main
from lit_fast.errors import UserError
from lit_fast.train.cost.hardware import GPUS, TPUS
from lit_fast.train.plan import target as target_module
from lit_fast.train.plan.costs import Prices
from lit_fast.train.plan.report import format_usd
from lit_fast.train.plan.slices import canonical, number_of_hosts, sold_as
from lit_fast.train.plan.target import open_target, select_platforms


@pytest.mark.parametrize(
    ("name", "topology", "shown", "hosts"),
    [
        ("v4-8", "v4:2x2x1", "v4-8", 1),
        ("v4-16", "v4:2x2x2", "v4-16", 2),
        ("v4:2x2x3", "v4:2x2x3", "v4:2x2x3", 3),
        ("v5litepod-4", "v5e:2x2", "v5litepod-4", 1),
        ("v5e-16", "v5e:4x4", "v5litepod-16", 4),
        ("v5p-8", "v5p:2x2x1", "v5p-8", 1),
        ("V6E-8", "v6e:2x4", "v6e-8", 1),
        ("ct6e-standard-4t", "v6e:2x2", "v6e-4", 1),
        ("h200", "gpu:h200", "h200", 1),
        ("gpu:h200:1", "gpu:h200", "h200", 1),
        ("h100:8", "gpu:h100:8", "a3-highgpu-8g", 1),
        ("p5en.48xlarge", "gpu:h200:8", "a3-ultragpu-8g", 1),
        ("gpu:a100:16", "gpu:a100:16", "gpu:a100:16", 2),
        ("cpu", "cpu", "cpu", 1),
    ],
)
def test_canonical_knows_the_names_of_the_clouds(name, topology, shown, hosts):
    assert canonical(name) == topology
    assert sold_as(topology) == shown
    chips = [int(n) for n in topology.partition(":")[2].split("x")] if topology.startswith("v") else []
    devices = int(topology.split(":")[2]) if topology.count(":") == 2 else 1
    for n in chips:
        devices *= n
    assert number_of_hosts(topology, devices) == hosts


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:2x2", "chip 'v9' is unknown; write v4-8"),
        ("v4-12", "no slice has this name; write v4-8, v4-16"),
        ("v5litepod-7", "no slice has this name; write v5litepod-1, v5litepod-4"),
        ("gpu:x1", "GPU 'x1' is unknown; write gpu:NAME or gpu:NAME:COUNT with one of b200"),
        ("h20", "did you mean h200?"),
        ("a3-highgpu-9g", "did you mean a3-highgpu-8g?"),
        ("gpu:h100:0", "'0' is not a number of GPUs; write gpu:h100:8"),
        ("gpu:h100:12", "12 GPUs are not whole hosts of 8; write for example gpu:h100:16"),
    ],
)
def test_canonical_refuses_unknown_names_with_near_ones(name, message):
    with pytest.raises(UserError) as error:
        canonical(name)
    assert message in str(error.value)


@given(st.text(max_size=20))
def test_canonical_of_any_text_is_stable_or_refused(text):
    try:
        topology = canonical(text)
    except UserError:
        return
    assert canonical(topology) == topology
    assert canonical(sold_as(topology)) == topology


def target(topology):
    name = topology.removeprefix("gpu:").partition(":")[0]
    chip = next(chip for chip in (*TPUS, *GPUS) if chip.name == name)
    return SimpleNamespace(topology=topology, chip=chip)


def test_prices_by_slice_chip_and_for_all():
    prices = Prices(["1", "v4=3.22,gpu:h200=3.5", "a3-highgpu-8g=2", "v6e-4=2.5"])
    found = {
        name: prices.of(target(name))
        for name in ("v4:2x2x1", "gpu:h200:8", "gpu:h100:8", "gpu:h100", "v6e:2x2", "v6e:4x4")
    }
    assert list(found.values()) == [3.22, 3.5, 2, 1, 2.5, 1]
    assert Prices().of(target("v4:2x2x1")) == 0
    assert Prices(["v5p=1"]).unused() == ["v5p"]


@pytest.mark.parametrize("value", ["-1", "nan", "v4=", "v4=inf", "x", "v7=1"])
def test_prices_refuse_what_is_no_price(value):
    with pytest.raises(UserError):
        Prices([value])


def test_comparison_has_a_line_for_every_slice_and_for_those_that_fail(tmp_path, capsys):
    (tmp_path / "c.toml").write_text(
        "steps = 1000\n[text]\nwidth = 64\ndepth = 2\nheads = 2\n[stream]\nglobal_batch = 256\n"
        "[optimizer]\nwarmup_steps = 1\n"
        '[plan]\ntower = "Ti/16"\nvocab_size = 500\nmax_length = 8\nrows = 4000\n'
    )
    out = tmp_path / "out.json"
    options = ["--price", "l4=0.7", "--json", str(out)]
    assert main(["plan", str(tmp_path / "c.toml"), "--topology", "l4,gpu:h100:8,v9-3,l4", *options]) == 0
    page, found = capsys.readouterr().out, json.loads(out.read_text())
    assert [s["topology"] for s in found["slices"]] == ["gpu:l4", "gpu:h100:8", "v9-3"]
    l4, h100, failed = found["slices"]
    assert "chip 'v9-3' is unknown" in failed["error"]
    assert f"not planned: {failed['error']}" in page
    assert [line.split()[0] for line in page.splitlines() if " x " in line] == ["l4", "a3-highgpu-8g"]
    assert (found["fastest"], found["cheapest"]) == ("a3-highgpu-8g", "l4")
    assert l4["usd"]["training"] == pytest.approx(0.7 * l4["planning"]["seconds"] * 1000 / 3600)
    assert h100["usd"] is None
    assert max(map(len, page.splitlines())) <= 180


def test_comparison_prints_step_hours_price_and_what_to_stream(tmp_path, capsys):
    (tmp_path / "c.toml").write_text(
        "steps = 100_000\n[text]\nwidth = 64\ndepth = 2\nheads = 2\n[stream]\nglobal_batch = 256\n"
        '[plan]\ntower = "Ti/16"\nvocab_size = 500\nmax_length = 8\nrows = 4000\n'
    )
    out = tmp_path / "out.json"
    options = ["--topology", "gpu:h100:16,l4", "--price", "2", "--json", str(out)]
    assert main(["plan", str(tmp_path / "c.toml"), *options]) == 0
    page, (h100, l4) = capsys.readouterr().out, json.loads(out.read_text())["slices"]
    assert (h100["hosts"], l4["hosts"]) == (2, 1)
    for plan, chips in ((h100, "16 x H100"), (l4, "1 x L4")):
        (line,) = (line for line in page.splitlines() if chips in line)
        planning = plan["planning"]
        low, high = (planning[k] * 100_000 / 3600 for k in ("low_seconds", "high_seconds"))
        for cell in (
            f"{plan['memory']['total'] / 2**30:.1f} of ", f"{low:.1f} - {high:.1f}",
            format_usd(plan["usd"]["training"]), format_usd(plan["usd"]["embedding"]),
            f"{256 / planning['seconds'] / plan['hosts']:,.0f}",
        ):  # fmt: skip
            assert f" {cell}" in line
    assert "USD to embed: 4,000 images, by arithmetic" in page
    assert "not in the USD: storage of features, tokens and checkpoints, " in page


@pytest.mark.parametrize(
    ("topologies", "gpu", "plugin", "tried"),
    [
        (["h200"], True, True, ["cuda,cpu"]),
        (["h200"], False, True, ["cpu"]),  # JAX's CUDA package would fail with a traceback
        (["h200"], True, False, ["cpu"]),
        (["v4-8", "nonsense"], True, True, ["cpu"]),
    ],
)
def test_select_platforms_starts_a_gpu_only_where_one_is_here_and_asked_for(
    topologies, gpu, plugin, tried, monkeypatch
):
    chosen: list[str] = []
    monkeypatch.setattr(target_module, "has_nvidia_gpu", lambda: gpu)
    monkeypatch.setattr(target_module, "_has_cuda_plugin", lambda: plugin)
    monkeypatch.setattr(target_module.jax.config, "update", lambda name, value: chosen.append(value))
    select_platforms(topologies)
    assert chosen == tried


def test_select_platforms_with_a_broken_driver_is_one_line(monkeypatch, capsys):
    def fail():
        raise RuntimeError("CUDA_ERROR_UNKNOWN\nmore lines")

    monkeypatch.setattr(target_module, "has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(target_module, "_has_cuda_plugin", lambda: True)
    chosen: list[str] = []
    monkeypatch.setattr(target_module.jax.config, "update", lambda name, value: chosen.append(value))
    monkeypatch.setattr(target_module.jax, "devices", fail)
    select_platforms(["h200"])
    assert chosen == ["cuda,cpu", "cpu"]
    assert capsys.readouterr().err == "the GPU of this machine cannot be used: CUDA_ERROR_UNKNOWN\n"


def test_comparison_of_slices_that_all_fail_is_an_error(tmp_path, capsys):
    (tmp_path / "c.toml").write_text("")
    assert main(["plan", str(tmp_path / "c.toml"), "--topology", "v9-3,gpu:x"]) == 2
    assert capsys.readouterr().err.count("v9-3") >= 1


def test_gpu_without_compiler_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = open_target("h200")
    assert found.mesh is None
    assert "lit-fast[plan-gpu]" in found.no_compiler
