"""`lit-fast plan`: its figures agree with each other, with the training and with the compiler."""

import importlib.util
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lit_fast.cli.main import main
from lit_fast.config_io import load_config
from lit_fast.errors import UserError
from lit_fast.train.cost.aot import tpu_mesh
from lit_fast.train.cost.hardware import GPUS, TPUS, chip_of, peak_flops
from lit_fast.train.cost.hlo import Collective, program_cost
from lit_fast.train.plan.candidates import Candidate, Planner
from lit_fast.train.plan.report import format_times
from lit_fast.train.plan.target import open_target
from lit_fast.train.plan.times import lower_bounds
from tests.helpers import samples, write_tar
from tests.synthetic import make_dataset

ONE_DAY = Path(__file__).parents[3] / "configs/siglit_b8_one_day.toml"
SMALL = """
steps = 1000
[text]
width = 64
depth = 3
heads = 2
dtype = "float32"
[stream]
global_batch = 256
[optimizer]
name = "adam"
warmup_steps = 1
[plan]
tower = "Ti/16"
vocab_size = 500
max_length = 8
rows = 4000
"""


@pytest.fixture
def plan(tmp_path, capsys, monkeypatch):
    """Return a function that runs the command on the small config: the JSON, and the page as `page`.

    Absent GPUs are estimated, also where their compiler is installed, unless `for_gpu` is set.
    """
    (tmp_path / "c.toml").write_text(SMALL)
    find = importlib.util.find_spec

    def run(*options, config=tmp_path / "c.toml", for_gpu=False):
        plugin = (
            (lambda name, *_: None if name.startswith("jax_cuda") else find(name)) if not for_gpu else find
        )
        monkeypatch.setattr("importlib.util.find_spec", plugin)
        capsys.readouterr()
        assert main(["plan", str(config), "--json", str(tmp_path / "out.json"), *options]) == 0
        return SimpleNamespace(
            **json.loads((tmp_path / "out.json").read_text()), page=capsys.readouterr().out
        )

    return run


def test_plan_on_this_machine_agrees_with_the_model(plan):
    found = plan("--topology", "cpu", "--price", "2", "--mfu", "0.4")
    assert (found.by, found.devices, found.way["keep"]) == ("compiler", jax.device_count(), "products")
    memory = found.memory
    kinds = ("parameters", "optimizer", "batch", "kept", "temporaries")
    assert sum(memory[kind] for kind in kinds) == memory["total"] <= memory["room"]
    # 3 layers of 12 w^2 + 13 w, the last norm, two tables, the head with its bias, t and b; twice that for Adam.
    w = 64
    count = 3 * (12 * w**2 + 13 * w) + 2 * w + (500 + 8) * w + (w + 1) * 192 + 2 + 192
    assert memory["parameters"] == 4 * count
    assert 8 * (count - 192) <= memory["optimizer"] <= 8 * count + 64  # the mean has no optimizer state
    assert memory["batch"] == 256 // found.devices * (192 * 2 + 8 * 2 + 4)
    # All gradients are reduced once, together with the sums of the loss.
    assert 0 <= found.collectives["all-reduce"]["bytes"] - 4 * (count - 192) < 1024
    # The step computes the model's products, and recomputes little.
    assert 0 <= found.flops["recompute"] < 0.06
    stated, paper = found.times["stated"], found.times["paper"]
    assert stated["mfu"] == pytest.approx(0.4)
    assert paper["mfu"] == pytest.approx(0.33)
    assert stated["seconds"] == pytest.approx(found.flops["model"] / found.chip["flops"] / 0.4)
    assert stated["hours"] == pytest.approx(1000 * stated["seconds"] / 3600)
    assert stated["rows_per_second"] == pytest.approx(256 / stated["seconds"])
    # A stated MFU is what to plan by, and the summary goes by it.
    assert (found.planning["by"], found.planning["seconds"]) == ("stated", stated["seconds"])
    assert found.usd["training"] == pytest.approx(2 * found.devices * stated["hours"])
    assert found.store["rows_per_second"] == pytest.approx(stated["rows_per_second"])
    assert found.store["bytes"] == 4000 * 192 * 2
    assert found.store["passes"] == 1000 * 256 / 4000
    assert "FITS" in found.page
    assert "recommended: the configuration as it is" in found.page


def test_plan_for_absent_gpus_is_an_estimate(plan):
    found = plan("--topology", "gpu:h100:8", "--text.pack", "1", config=ONE_DAY)
    assert found.by == "estimate"
    assert "ESTIMATE" in found.page
    assert len(found.page.splitlines()) <= 45
    # By hand: 32 768 texts of 16 tokens through 11 whole layers and one for a single position, and the loss.
    w, tokens = 1024, 16
    layer = tokens * 24 * w**2 + 4 * tokens**2 * w
    last = 20 * w**2 + 4 * tokens * w**2 + 4 * tokens * w
    model = 32_768 * (3 * (11 * layer + last + 2 * w * 768) + 2 * 2 * 32_768 * 768)
    assert found.flops["model"] * 8 == pytest.approx(model)
    # The shares of recomputation in the help of text.keep. What follows the loop over the layers is computed again.
    recomputation = {way["keep"]: way["executed_flops"] / found.flops["model"] - 1 for way in found.ways}
    assert recomputation == pytest.approx(
        {"products": 0.007, "hidden": 0.09, "inputs": 0.22, "embeddings": 0.33}, abs=0.006
    )
    assert (found.limit, found.limited) == ("compute", False)
    # The products of the loss run as TF32, at half the rate.
    loss = 2 * 2 * 32_768**2 * 768 / 8
    assert found.floors["compute"] == pytest.approx(
        (found.flops["executed"] - loss) / 989e12 + loss / 494.5e12, rel=5e-3
    )
    assert found.store["row_bytes"] == 768 * 2 + 16 * 2


def test_plan_of_a_trained_image_tower_counts_both_towers_and_the_decoding(plan):
    options = ["--image.train", "scratch", "--image.arch", "mu/8", "--image.resolution", "64"]
    found, frozen = (
        plan("--topology", "gpu:h100:8", *more) for more in (options, ["--plan.tower", "mu/8", "--no-search"])
    )
    # By hand: one layer of width 32 on 64 tokens, attention pooling, three times the forward pass.
    w, tokens = 32, 64
    image = tokens * 24 * w**2 + 4 * tokens**2 * w + 2 * tokens * 3 * 8**2 * w
    image += 4 * w**2 + 4 * tokens * w**2 + 4 * tokens * w + 16 * w**2
    added = 3 * 256 * image + 2 * 256**2 * w  # and the gradient of the images
    assert (found.flops["model"] - frozen.flops["model"]) * 8 == pytest.approx(added)
    executed = {way["image_keep"]: way["executed_flops"] for way in found.ways}
    assert executed["products"] == pytest.approx(found.flops["model"], rel=0.05)
    assert executed["embeddings"] > executed["inputs"] > executed["hidden"] >= executed["products"]
    assert all(way["image_keep"] == way["keep"] for way in found.ways)
    store = found.store
    assert (store["bytes"], store["row_bytes"]) == (0, 3 * 64**2 + 8 * 2)
    assert store["cores_per_host"] == pytest.approx(store["rows_per_second"] / 390)
    assert "to decode: " in found.page
    assert "features of" not in found.page
    assert "; images " in found.page


def test_plan_of_the_unlocked_tower_of_a_dataset_takes_that_of_its_features(plan, tiny_vit, tmp_path):
    write_tar(tmp_path / "0.tar", samples(3))
    for command in (
        ["index", str(tmp_path / "0.tar"), "--out", str(tmp_path / "d")],
        ["embed", str(tmp_path / "d"), "--tower", str(tiny_vit)],
    ):
        assert main(command) == 0
    options = ["--image.train", "unlocked", "--dataset", str(tmp_path / "d")]
    found = plan("--topology", "gpu:h100", "--no-search", *options)
    assert found.store["row_bytes"] == 3 * 32**2 + 8 * 2
    assert "trained image tower of 32 pixels" in found.page


def test_plan_for_one_gpu_has_no_collectives(plan):
    one, eight = (plan("--topology", f"gpu:h100:{n}", "--no-search") for n in (1, 8))
    assert one.collectives == {}
    assert one.floors["interconnect"] == 0
    assert one.flops["model"] == pytest.approx(8 * eight.flops["model"])
    assert len(one.ways) == 1


def test_plan_of_a_policy_that_does_not_fit_recommends_one_that_does(plan):
    found = plan("--topology", "gpu:l4", "--text.keep", "products", config=ONE_DAY)
    assert not found.memory["fits"]
    assert found.memory["total"] > found.memory["room"]
    assert "DOES NOT FIT" in found.page
    # The recommended flags fit.
    options = found.overrides.split()
    again = plan("--topology", "gpu:l4", "--no-search", *options, config=ONE_DAY)
    assert again.memory["fits"]
    assert (
        found.overrides
        == f"--text.keep {again.way['keep']} --text.microbatches {again.way['parts']} --text.pack 8"
    )


def test_plan_takes_the_figures_of_the_dataset(plan, tmp_path):
    make_dataset(tmp_path / "d", 70)
    found = plan("--topology", "gpu:l4", "--dataset", str(tmp_path / "d"))
    tokens = json.loads((tmp_path / "d/tokens/words/tokens.json").read_text())
    assert (found.store["rows"], found.data["width"], found.data["tower"]) == (70, 16, "tower")
    assert found.data["vocab_size"] == tokens["vocab_size"]
    assert found.data["max_length"] == tokens["max_length"]
    assert found.store["embedding_seconds"] is None


def test_plan_takes_the_rows_of_an_indexed_dataset(plan, tmp_path):
    import shutil

    make_dataset(tmp_path / "d", 70)
    shutil.rmtree(tmp_path / "d/tokens")
    shutil.rmtree(tmp_path / "d/features")
    found = plan("--topology", "gpu:l4", "--dataset", str(tmp_path / "d"))
    assert (found.store["rows"], found.data["width"], found.data["vocab_size"]) == (70, 192, 500)
    assert found.store["embedding_seconds"] > 0


def test_row_bytes_with_a_large_vocabulary_and_several_captions(plan):
    options = ("--plan.vocab_size", "70000", "--stream.captions_per_image", "3")
    found = plan("--topology", "gpu:l4", "--no-search", *options)
    assert found.store["row_bytes"] == 192 * 2 + 3 * 8 * 4


def test_format_times_marks_times_below_the_lower_bound():
    def time(seconds):
        return {"seconds": seconds, "mfu": 1 / seconds, "hours": 1.0, "rows_per_second": 1.0}

    times = {"floor": time(2.0), "paper": time(3.0), "stated": time(1.0)}
    plan = {"limit": "memory bandwidth", "mfu": 1.0, "price": 0.0, "times": times, "devices": 1}
    lines = format_times(
        plan | {"chip": {"name": "v4"}, "planning": {"by": "stated"}, "kernels_limit": False}
    )
    assert ["below the lower bound" in line for line in lines] == [False, False, False, True]
    assert "at 100 % MFU" in lines[-1]


def test_lower_bounds_by_kind_of_collective():
    memory = SimpleNamespace(parameters=0, optimizer=0, gradients=0, batch=0, residuals=lambda text: 0)
    memory.image_residuals = lambda image: 0
    planner = SimpleNamespace(
        memory=lambda *towers: memory,
        product_seconds=lambda *towers: 0.0,
        target=SimpleNamespace(chip=TPUS[0], devices=4),
    )
    bytes_sent = {"all-gather": 3, "reduce-scatter": 0.75, "all-reduce": 1.5, "collective-permute": 1}
    for name, share in bytes_sent.items():
        candidate = SimpleNamespace(text=None, image=None, flops=0, collectives={name: Collective(1, 300e9)})
        assert lower_bounds(planner, candidate)["interconnect"] == pytest.approx(share)


@pytest.mark.usefixtures("plan")
def test_plan_of_a_batch_that_does_not_fit_names_the_largest_that_does(tmp_path, capsys):
    options = (
        "--topology",
        "gpu:l4",
        "--text.pack",
        "3",
        "--stream.global_batch",
        "1572864000",
        "--largest-batch",
    )
    assert main(["plan", str(tmp_path / "c.toml"), *options]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    batch = int(re.search(r"the largest that fits: --stream.global_batch (\d+) --text.keep", said)[1])
    assert batch % 3 == 0
    assert 10_000 < batch < 1_572_864_000


@pytest.mark.usefixtures("plan")
def test_plan_whose_compiler_fails_is_one_line(tmp_path, capsys, monkeypatch):
    def fail(*args):
        raise jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed to compile TPU kernel\nat line 1")

    monkeypatch.setattr("lit_fast.train.plan.candidates.try_compile", fail)
    assert main(["plan", str(tmp_path / "c.toml"), "--topology", "cpu", "--no-search"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "the compiler fails for cpu" in said
    assert ": INTERNAL: Mosaic failed to compile TPU kernel; plan another candidate" in said


@pytest.mark.parametrize("tower", ["B/0", "nope", "B/17"])
@pytest.mark.usefixtures("plan")
def test_plan_refuses_unknown_towers(tmp_path, capsys, tower):
    config = tmp_path / "c.toml"
    assert main(["plan", str(config), "--topology", "gpu:l4", "--plan.tower", tower]) == 2
    assert "plan.tower" in capsys.readouterr().err


def test_packing_by_true_length_needs_fewer_products(plan):
    masked = (
        "--topology",
        "gpu:l4",
        "--no-search",
        "--text.mask_padding",
        "true",
        "--plan.caption_tokens",
        "4",
    )
    padded, packed = plan(*masked), plan(*masked, "--text.pack", "8")
    assert packed.way["pack"] == 8
    # Half of the eight positions are padding, which is not computed; rows have little padding.
    assert packed.flops["model"] < 0.55 * padded.flops["model"]
    assert packed.way["executed_flops"] < 0.8 * padded.way["executed_flops"]
    assert packed.memory["kept"] < padded.memory["kept"]
    given = plan(*masked, "--text.pack", "8", "--text.rows", "64")  # more than required
    assert given.memory["kept"] > packed.memory["kept"]


def test_largest_batch_fits_and_twice_as_much_does_not(plan):
    found = plan("--topology", "gpu:l4", "--no-search", "--largest-batch", config=ONE_DAY)
    batch, options = found.largest_batch["global_batch"], found.largest_batch["overrides"].split()

    def at(batch):
        return plan(
            "--topology",
            "gpu:l4",
            "--no-search",
            "--stream.global_batch",
            str(batch),
            *options,
            config=ONE_DAY,
        )

    fits, twice = at(batch), at(2 * batch)
    assert fits.memory["fits"]
    assert fits.memory["total"] == found.largest_batch["bytes"]
    assert not twice.memory["fits"]


def test_chip_of_finds_every_chip_by_device_kind():
    for chip in (*TPUS, *GPUS):
        assert chip_of(chip.kind) == chip
    names = {
        "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p",
        "TPU v6 lite": "v6e", "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "NVIDIA L40S": "l40s",
        "NVIDIA L40": "l40", "NVIDIA L4": "l4", "NVIDIA GeForce RTX 4090": "rtx4090",
    }  # fmt: skip
    assert {kind: chip_of(kind).name for kind in names} == names
    assert chip_of("cpu") is None
    assert peak_flops(jax.devices()[0]) is None


@pytest.mark.parametrize("name", [path.name for path in ONE_DAY.parent.glob("*.toml")])
def test_every_recipe_can_be_planned(plan, name):
    found = plan("--topology", "gpu:h200:8", "--no-search", config=ONE_DAY.parent / name)
    assert found.steps == load_config(ONE_DAY.parent / name).steps


@pytest.mark.parametrize(
    ("name", "precision", "passes"),
    [
        ("v4", "DEFAULT", 1),
        ("v4", "HIGH", 3),
        ("v4", "HIGHEST", 6),
        ("h200", "HIGH", 2),
        ("h200", "HIGHEST", 989 / 67),
    ],
)
def test_passes_of_float32_products(name, precision, passes):
    chip = next(chip for chip in (*TPUS, *GPUS) if chip.name == name)
    assert chip.passes(np.dtype("float32"), precision) == pytest.approx(passes)
    assert chip.passes(jnp.dtype("bfloat16"), precision) == 1
    # The memory of a GPU that is here is its own.
    assert chip._replace(memory=1.0).passes(np.dtype("float32"), precision) == pytest.approx(passes)


def test_candidates_of_a_gpu_rank_by_their_kernels():
    """Where the compiler gives no time, fewer kernels are faster; on TPUs its time decides."""
    seconds = Planner.relative_seconds
    planner = SimpleNamespace(product_seconds=lambda *towers: 0.5, target=SimpleNamespace(platform="gpu"))
    planner.kernel_seconds = lambda candidate: Planner.kernel_seconds(planner, candidate)
    few, many = (
        Candidate(None, None, 1, True, 1.0, None, {}, None, SimpleNamespace(kernels=n)) for n in (1e4, 1e5)
    )
    assert seconds(planner, few) == pytest.approx(0.52)
    assert seconds(planner, many) == pytest.approx(0.7)
    assert seconds(planner, few._replace(compiler_seconds=0.9)) == 0.9
    planner.target.platform = "tpu"
    assert seconds(planner, many) == 0.5


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="the extra plan-gpu is not installed"
)
def test_plan_for_an_absent_gpu_compiles_the_step(plan):
    """The memory is that of the compiled step, as the training on such a GPU reads it."""
    found = plan("--topology", "h200", "--text.dtype", "bfloat16", "--no-search", for_gpu=True)
    assert (found.by, found.no_compiler, found.hosts) == ("compiler", "", 1)
    assert found.program["kernels"] > 100
    assert found.planning["by"] == "paper"
    assert found.memory["fits"]
    assert "kernels" in found.page


# --- with the TPU's compiler


@pytest.fixture(scope="session")
def libtpu():
    if importlib.util.find_spec("libtpu") is None and not os.environ.get("TPU_LIBRARY_PATH"):
        pytest.skip("libtpu is not installed")


@pytest.mark.usefixtures("libtpu")
def test_plan_for_an_absent_tpu_slice_compiles_the_step(plan):
    found = plan("--topology", "v4:2x2x1", "--no-search", "--text.width", "128", "--text.dtype", "bfloat16")
    assert (found.by, found.devices) == ("compiler", 4)
    assert found.flops["recompute"] == pytest.approx(0, abs=0.05)
    assert found.times["compiler"]["seconds"] > found.times["floor"]["seconds"]
    assert set(found.collectives) == {"all-reduce", "collective-permute"}
    # The float32 images of four devices rotate around the ring; the compiler pads shapes to multiples of 128.
    assert found.collectives["collective-permute"]["bytes"] >= 256 * 192 * 4
    assert "compiler's estimate" in found.page


@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "v6e:1x1"])
def test_clock_agrees_with_peak_flops(topology):
    """The compiler estimates slightly more cycles for a large product than its FLOPs at peak take."""
    import jax.numpy as jnp

    from lit_fast.runtime import replicated

    target = open_target(topology)
    size = 4096
    matrix = jax.ShapeDtypeStruct((size, size), jnp.bfloat16, sharding=replicated(target.mesh))
    text = jax.jit(lambda a, b: a @ b).lower(matrix, matrix).compile().as_text()
    seconds = program_cost(text).cycles / target.chip.clock
    share = 2 * size**3 / target.chip.flops / seconds
    assert 0.8 < share <= 1


@pytest.mark.usefixtures("libtpu")
def test_tpu_mesh_has_the_devices_of_the_topology():
    assert {device.device_kind for device in tpu_mesh("v5e:2x2").devices.flat} == {"TPU v5 lite"}


@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize("topology", ["v4:3x5x7", "v5e:9x9", "v5e:abc"])
def test_open_target_reports_why_libtpu_refuses_a_slice(topology):
    with pytest.raises(
        UserError, match=f"--topology {topology} is refused by libtpu: INVALID_ARGUMENT"
    ) as error:
        open_target(topology)
    assert "\n" not in str(error.value)
