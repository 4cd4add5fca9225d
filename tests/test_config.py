"""The configuration: files, overrides, validation, the reference page and the committed recipes."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_fast.cli.main import COMMANDS
from lit_fast.cli.reference import reference as commands
from lit_fast.config import Config, EvalConfig, LossConfig, OptimizerConfig, settings
from lit_fast.config_io import RENAMED, load_config, recipes, reference, to_toml
from lit_fast.errors import UserError
from lit_fast.models.sizes import VARIANTS

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "configs").glob("*.toml"))


def load(tmp_path, text="", *overrides):
    path = tmp_path / "c.toml"
    path.write_text(text)
    return load_config(path, overrides)


def test_load_config_overrides_win_over_file_and_defaults(tmp_path):
    assert load(tmp_path) == Config()
    text = "steps = 7000\n[optimizer]\nlearning_rate = 1"
    config = load(
        tmp_path, text, "--optimizer.learning_rate", "3e-4", "--steps=8_000", "--loss.center", "True"
    )
    assert (config.optimizer.learning_rate, config.steps, config.loss.center) == (3e-4, 8000, True)
    assert load(tmp_path, text).optimizer.learning_rate == 1.0
    sets = load(tmp_path, "", "--evaluate.retrieval", "a,b").evaluate.retrieval
    assert sets == ("a", "b")


@given(
    dataset=st.text(),
    learning_rate=st.floats(0, 1e6),
    seed=st.integers(0, 2**32 - 2),
    center=st.booleans(),
    sets=st.lists(st.text(min_size=1), max_size=3),
)
def test_to_toml_load_config_round_trip(tmp_path_factory, dataset, learning_rate, seed, center, sets):
    config = Config(
        dataset=dataset,
        seed=seed,
        loss=LossConfig(center=center),
        optimizer=OptimizerConfig(learning_rate=learning_rate),
        evaluate=EvalConfig(zero_shot=tuple(sets)),
    )
    path = tmp_path_factory.mktemp("c") / "c.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert load_config(path) == config


def test_load_config_accepts_hyphens_and_negative_numbers(tmp_path):
    config = load(
        tmp_path, "", "--text.mask-padding", "true", "--loss.bias-init=-1e1", "--loss.bias_init", "-12"
    )
    assert config.text.mask_padding
    assert config.loss.bias_init == -12


def test_load_config_finds_packaged_recipes_by_name(tmp_path, monkeypatch):
    assert recipes() == [path.stem for path in RECIPES]
    monkeypatch.chdir(tmp_path)
    assert load_config("flickr8k_cpu") == load_config(ROOT / "configs/flickr8k_cpu.toml")
    Path("coco").mkdir()
    assert load_config("coco") == load_config(ROOT / "configs/coco.toml")
    with pytest.raises(UserError, match=r"^config \. is a directory; give a TOML file"):
        load_config(".")
    Path("flickr8k_cpu").write_text("steps = 7000")
    assert load_config("flickr8k_cpu").steps == 7000
    with pytest.raises(
        UserError, match=r"config siglit_b8_oneday does not exist; did you mean siglit_b8_one_day\?"
    ):
        load_config("siglit_b8_oneday")
    with pytest.raises(UserError, match="give a TOML file or the name of a recipe: cc12m, "):
        load_config("c.toml")


def test_reference_is_the_committed_page():
    page = (ROOT / "docs/configuration.md").read_text()
    assert page == reference(), "run: python -m lit_fast.config_io > docs/configuration.md"
    assert all(f"| `{key.rpartition('.')[2]}` |" in page for key in settings())


def test_reference_of_commands_is_the_committed_page():
    page = (ROOT / "docs/commands.md").read_text()
    assert page == commands(), "run: python -m lit_fast.cli.reference > docs/commands.md"
    assert all(f"## lit-fast {name}\n" in page for name in COMMANDS)


@pytest.mark.parametrize("old", RENAMED)
def test_load_config_names_the_new_key_of_a_renamed_one(tmp_path, old):
    assert RENAMED[old] in settings()
    with pytest.raises(
        UserError, match=f"config key {old} on the command line was renamed; write {RENAMED[old]}$"
    ):
        load(tmp_path, "", f"--{old}", "2")


def test_text_shape_applies_overrides_to_the_variant(tmp_path):
    assert load(tmp_path, '[text]\nvariant = "L"\ndepth = 12').text.shape == VARIANTS["L"]._replace(depth=12)
    assert load(tmp_path, "[text]\nwidth = 256").text.shape == (256, 12, 1024, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepps = 3", "did you mean steps?"),
        ("learning_rate = 3", "did you mean optimizer.learning_rate?"),
        ("[optimiser]\nlearning_rate = 3", "did you mean optimizer.learning_rate?"),
        ("zzz = 1", "unknown config key 'zzz' in"),
        ("steps = 0", "must be at least 1"),
        ("steps = 3.5", "must be a whole number"),
        ("steps = true", "must be a whole number"),
        ("text = 3", "unknown config key 'text'"),
        ("[evaluate]\nretrieval = 'x'", "must be a list of strings"),
        ("[loss]\ntemperature_init = 0", "must be above 0"),
        ("[loss]\ntemperature_init = nan", "must be a finite number"),
        ("[loss]\ntemperature_max = 9.0", "temperature_init 10.0 must be at most loss.temperature_max 9.0"),
        (
            '[loss]\nname = "softmax"\nbias_init = 0.0',
            'bias_init has no effect with loss.name = "softmax"; leave',
        ),
        (
            "[loss]\nbias = false\nbias_init = 0.0",
            "loss.bias_init has no effect with loss.bias = false; leave it out",
        ),
        (
            '[loss]\nname = "softmax"\nnegatives = "random"\nnegatives_per_positive = 2',
            "for the sigmoid loss",
        ),
        ("[stream]\nneighbours = 1", "stream.neighbours must be 0, or 2 or more, not 1"),
        ("[stream]\nneighbours = 9\nglobal_batch = 8", "9 must be at most stream.global_batch 8"),
        ('[loss]\nnegatives = "hardest"', "needs loss.negatives_per_positive above 0"),
        ("[loss]\nnegatives_per_positive = 2", "needs loss.negatives ="),
        ('[loss]\nnegatives = "hard"', "must be one of all, random, hardest, easiest"),
        ("[optimizer]\nlearning_rate = inf", "must be a finite number"),
        ("[text]\ndropout = 1.0", "below 1"),
        ("[text]\nheads = 7", "not a multiple of text.heads"),
        ("[text]\nkeep = 'all'", "must be one of auto, products, hidden, inputs, embeddings"),
        ("[text]\nmicrobatches = 4", 'text.microbatches is chosen by text.keep = "auto"; leave it out'),
        ("[stream]\ncorrupt_texts = 1.1", "stream.corrupt_texts must be at most 1"),
        ("[stream]\ncorrupt_alignment = -0.1", "stream.corrupt_alignment must be at least 0"),
        ("[stream]\ncorrupt_images = 0.1", "stream.corrupt_images above 0 and stream.noise need each other"),
        ("[stream]\nnoise = 'n'", "stream.corrupt_images above 0 and stream.noise need each other"),
        ("[text]\npooling = 'cls'", "must be one of last, first, mean, max, map"),
        ("[text]\nembedding_width = -1", "must be at least 0"),
        ("steps = 100\n[optimizer]\nwarmup_steps = 100", "must be below steps"),
        ("[image]\ntower = 'x.npz'", 'image.tower is for image.train = "unlocked" or "scratch"'),
        ("[image]\ntrain = 'locked'", "must be one of frozen, unlocked, scratch"),
        (
            "[image]\ntrain = 'unlocked'\npool = 'mean'",
            "must be one of tok, gap, map, projection, not 'mean'",
        ),
        ("[image]\ntrain = 'unlocked'\narch = 'B/16'", 'image.arch is for image.train = "scratch"'),
        ("[image]\ntrain = 'scratch'\narch = 'B16'", "image.arch 'B16' is not SIZE/PATCH, such as B/16"),
        ("[image]\ntrain = 'scratch'\narch = 'B/16'\ntower = 'x'", "exclude each other"),
        ("[image]\ntrain = 'scratch'\nmicrobatches = 2", 'is chosen by image.keep = "auto"'),
        ("[image]\ntrain = 'scratch'\n[loss]\ncenter = true", "loss.center needs stored features"),
        (
            "[image]\ntrain = 'scratch'\n[stream]\ncorrupt_images = 0.1\nnoise = 'n'",
            'stream.corrupt_images is for image.train = "frozen"',
        ),
        (
            "[image]\ntrain = 'scratch'\narch = 'B/16'\n[stream]\nneighbours = 2",
            'stream.neighbours is for image.train = "frozen"; leave it out',
        ),
        ("[evaluate]\nfew_shot = ['a=b']", "a frozen tower has the same figures"),
        ("[image]\ntrain = 'scratch'\n[evaluate]\nfew_shot = ['ab']", "'ab' is not TRAIN=TEST"),
    ],
)
def test_load_config_refuses_invalid_values(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        load(tmp_path, text)
    assert message in str(error.value)


def test_load_config_unlocked_has_the_papers_rules_for_pretrained_weights_unless_given(tmp_path):
    optimizer = load(tmp_path, "[image]\ntrain = 'unlocked'").optimizer
    assert optimizer.learning_rate_scale == ("img/(?!head/).*=0.1",)
    assert optimizer.weight_decay_scale == ("img/(?!head/).*=0", "(.*/)?kernel=1")
    given = "[image]\ntrain = 'unlocked'\n[optimizer]\nlearning_rate_scale = []"
    assert load(tmp_path, given).optimizer.learning_rate_scale == ()
    for train in ("frozen", "scratch"):
        assert load(tmp_path, f"[image]\ntrain = '{train}'").optimizer == OptimizerConfig()
    resolved = to_toml(load(tmp_path, given))  # read again, it is the same
    assert load(tmp_path, resolved).optimizer.learning_rate_scale == ()


@pytest.mark.parametrize("path", RECIPES, ids=[p.stem for p in RECIPES])
def test_recipe_header_names_command_hours_and_score(path):
    load_config(path)
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    for word in (f"lit-fast train {path.stem} ", "Hours:", "Score:"):
        assert word in header


def test_one_day_recipe_is_that_of_the_paper():
    config = load_config("siglit_b8_one_day")
    assert config.text.shape == (1024, 12, 4096, 16)
    assert (config.stream.global_batch, config.steps, config.optimizer.warmup_steps) == (
        32_768,
        65_000,
        6_500,
    )
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (1e-4, 1e-7)
    assert config.text.pooling == "last"
    assert not config.text.mask_padding
    assert (config.loss.temperature_init, config.loss.bias_init) == (10.0, -10.0)
