"""The embedding stage beside its rivals: decoding per core, the ViT's forward pass, end to end from tars.

    python -m benchmarks.embed [--model vit_tiny_patch16_224] [--photos 'train/*.tar'] [--images 2000]

Needs torch and timm. The rival is timm with the same random weights in the same precision: eager and
compiled, and for the whole job a plain loop (DataLoader, timm's transform, `numpy.save`). Without
`--photos` it draws its own. On a GPU the precision is bfloat16 and the table has the MFU.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.machine import describe
from lit_fast.storage.machine import cpu_count
from tests.torch_packages import load_torchvision

SIZES = {"500 x 375": (500, 375), "1600 x 1200": (1600, 1200)}


def draw_photo(rng: np.random.Generator, width: int, height: int) -> bytes:
    """Return a JPEG with smooth shapes, edges and grain, about as large as a photo of its size."""
    pixels = np.zeros((height, width, 3), np.float32)
    for cells, strength in ((3, 60), (12, 35), (60, 20)):
        field = rng.standard_normal((cells, cells, 3)).astype(np.float32)
        scaled = [
            np.asarray(Image.fromarray(field[:, :, c]).resize((width, height), Image.Resampling.BICUBIC))
            for c in range(3)
        ]
        pixels += strength * np.stack(scaled, axis=-1)
    pixels += 4 * rng.standard_normal(pixels.shape).astype(np.float32)
    out = io.BytesIO()
    Image.fromarray((pixels + 128).clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def draw_tars(folder: Path, images: int) -> list[Path]:
    """Write tars of 500 drawn photos each, in the webdataset layout."""
    rng = np.random.default_rng(0)
    tars = []
    for first in range(0, images, 500):
        path = folder / f"{first // 500:05d}.tar"
        with tarfile.open(path, "w") as tar:
            for i in range(first, min(first + 500, images)):
                for suffix, data in ((".jpg", draw_photo(rng, 500, 375)), (".txt", b"a drawn photo")):
                    member = tarfile.TarInfo(f"{i:06d}{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        tars.append(path)
    return tars


def save_model(model_name: str, folder: Path) -> None:
    """Write timm's model with random weights, in the layout of its repositories on the Hub."""
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = timm.create_model(model_name)
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {"architecture": model_name, "pretrained_cfg": model.pretrained_cfg}
    (folder / "config.json").write_text(json.dumps(config))


def timm_model(model_name: str, folder: Path, device: str):
    import timm
    import torch
    from safetensors.torch import load_file

    model = timm.create_model(model_name)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    model.reset_classifier(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return model.eval().to(device, dtype)


def spread(function: Callable[[], object], repetitions: int) -> tuple[float, float, float]:
    """Return the median, lowest and highest seconds of a call, after two warm-up calls."""
    function(), function()
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), min(seconds), max(seconds)


def decoders(size: int) -> dict[str, Callable[[bytes], np.ndarray]]:
    """Return functions of the bytes of a file to `[size, size, 3]`: short side to size / 0.9, centre crop."""
    from lit_fast.data.images.decode import decode
    from lit_fast.towers.preprocess import Preprocess

    exact = Preprocess("pil-crop", size, int(size / 0.9))
    reduced = Preprocess("pil-crop", size, int(size / 0.9), reduced=True)
    found: dict[str, Callable[[bytes], np.ndarray]] = {
        "Pillow, exact (ours)": lambda data: exact.apply(decode(data)),
        "Pillow, reduced scale (ours)": lambda data: reduced.apply(decode(data, at_least=reduced.at_least)),
    }
    try:
        import cv2
    except ImportError:
        return found

    cv2.setNumThreads(1)

    def opencv(data: bytes) -> np.ndarray:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        height, width = image.shape[:2]
        scale = exact.resize / min(height, width)
        image = cv2.resize(image, (int(width * scale), int(height * scale)), interpolation=cv2.INTER_AREA)
        top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
        return image[top : top + size, left : left + size, ::-1]

    return found | {"OpenCV, area filter": opencv}


def decode_table(size: int, repetitions: int) -> None:
    print("\n| decode and resize, one core | photo | images/s | lowest - highest |\n|---|---|---|---|")
    rng = np.random.default_rng(1)
    for label, (width, height) in SIZES.items():
        photos = [draw_photo(rng, width, height) for _ in range(8)]
        for name, decoder in decoders(size).items():
            median, low, high = spread(lambda d=decoder, p=photos: [d(x) for x in p], repetitions)
            print(f"| {name} | {label} | {8 / median:,.0f} | {8 / high:,.0f} - {8 / low:,.0f} |")


def forward_table(model_name: str, folder: Path, batches: list[int], repetitions: int) -> None:
    import jax
    import torch

    from lit_fast.models.architecture import flops_per_image
    from lit_fast.towers.tower import load_tower
    from lit_fast.train.cost.hardware import peak_flops

    tower = load_tower(str(folder))
    gpu = jax.default_backend() == "gpu"
    device = "cuda" if gpu else "cpu"
    dtype = jax.numpy.bfloat16 if gpu else jax.numpy.float32
    embed = jax.jit(lambda p, x: tower.embed(p, x, dtype))
    params = jax.device_put(tower.params)
    eager = timm_model(model_name, folder, device)
    models = {"timm, eager": eager, "timm, torch.compile": torch.compile(eager)}
    mean, std = (torch.tensor(v, device=device) for v in (tower.preprocess.mean, tower.preprocess.std))
    peak = peak_flops(jax.devices()[0])
    flops = flops_per_image(tower.architecture, tower.preprocess.size)

    def theirs(model: Callable, images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            x = torch.from_numpy(images).to(device, non_blocking=True)
            x = ((x.float() / 255 - mean) / std).permute(0, 3, 1, 2)
            return model(x.to(next(eager.parameters()).dtype)).float().cpu().numpy()

    header = ["forward pass", "batch", "images/s", "lowest - highest", *["MFU"] * bool(peak)]
    print(f"\n{table_row(header)}\n{table_row(['---'] * len(header))}")
    for batch in batches:
        size = tower.preprocess.size
        images = np.random.default_rng(2).integers(0, 256, (batch, size, size, 3), np.uint8)
        ours = np.asarray(embed(params, images))
        rival = theirs(eager, images)
        difference = np.abs(ours - rival).max()
        # The two implementations round differently.
        assert difference < (1e-3 if not gpu else 0.25), f"not the same features: {difference}"
        cases = {"ours": lambda x=images: np.asarray(embed(params, x))}
        cases |= {name: lambda m=m, x=images: theirs(m, x) for name, m in models.items()}
        for name, run in cases.items():
            try:
                median, low, high = spread(run, repetitions)
            except Exception as error:  # torch.compile needs a C++ compiler, memory, ...
                cells = [f"failed: {type(error).__name__}"]
            else:
                cells = [f"{batch / median:,.1f}", f"{batch / high:,.1f} - {batch / low:,.1f}"]
                cells += [f"{flops * batch / median / peak:.1%}"] if peak else []
            cells = [name, str(batch), *cells]
            print(table_row(cells + [""] * (len(header) - len(cells))))


def table_row(cells: list[str]) -> str:
    """Format a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


class Photos:
    """The images of tars for a DataLoader, with timm's transform."""

    def __init__(self, tars: list[str], transform: Callable) -> None:
        self.transform, self.positions = transform, []
        for path in tars:
            with tarfile.open(path) as tar:
                self.positions += [
                    (path, m.offset_data, m.size) for m in tar if m.name.endswith((".jpg", ".png", ".jpeg"))
                ]

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, i: int):
        path, offset, size = self.positions[i]
        with open(path, "rb") as file:
            file.seek(offset)
            return self.transform(Image.open(io.BytesIO(file.read(size))).convert("RGB"))


def plain_loop(model_name: str, folder: Path, tars: list[str], out: Path, batch: int, workers: int) -> None:
    """Embed tars with a plain loop: DataLoader, model, list of arrays, `numpy.save`."""
    import timm
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = timm_model(model_name, folder, device)
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    loader = torch.utils.data.DataLoader(
        Photos(tars, transform), batch_size=batch, num_workers=workers, pin_memory=device == "cuda"
    )
    features = []
    with torch.inference_mode():
        for images in loader:
            images = images.to(device, next(model.parameters()).dtype, non_blocking=True)
            features.append(model(images).float().cpu().numpy())
    np.save(out, np.concatenate(features))


def whole_job_table(model_name: str, folder: Path, tars: list[Path], batch: int, repetitions: int) -> None:
    """Measure whole processes, from their start to the features on the disk."""

    work, images = folder.parent, 0
    workers = cpu_count()
    lit_fast = [sys.executable, "-m", "lit_fast"]
    results: dict[str, list[float]] = {}
    for repetition in range(repetitions):
        dataset = work / f"dataset{repetition}"
        index = [*lit_fast, "index", *map(str, tars), "--out", str(dataset)]
        subprocess.run(index, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        images = json.loads((dataset / "dataset.json").read_text())["rows"]
        rival = [sys.executable, "-m", "benchmarks.embed", "--plain-loop", str(work / "rival.npy")]
        rival += [
            "--model",
            model_name,
            "--weights",
            str(folder),
            "--batch",
            str(batch),
            "--photos",
            *map(str, tars),
        ]
        ours = [*lit_fast, "embed", str(dataset), "--tower", str(folder)]
        cases = {
            "lit-fast embed": ours,
            "lit-fast embed --dtype float32": [*ours, "--dtype", "float32", "--name", "float32"],
            "lit-fast embed --reduced-decode": [*ours, "--reduced-decode", "--name", "reduced"],
            f"timm, DataLoader of {workers} workers": [*rival, "--workers", str(workers)],
            "timm, DataLoader without workers": [*rival, "--workers", "0"],
        }
        for name, command in cases.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            results.setdefault(name, []).append(time.perf_counter() - start)
    print(
        f"\n| {images:,} photos, process start to features on disk | images/s | lowest - highest |\n|---|---|---|"
    )
    for name, seconds in results.items():
        median, low, high = statistics.median(seconds), min(seconds), max(seconds)
        print(f"| {name} | {images / median:,.1f} | {images / high:,.1f} - {images / low:,.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="a ViT of timm")
    parser.add_argument("--photos", nargs="+", default=[], help="tars; default: drawn ones")
    parser.add_argument("--images", type=int, default=2000, help="photos to draw")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32], help="of the forward pass")
    parser.add_argument("--batch", type=int, default=32, help="of the plain loop")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=3, help="repetitions of the whole job")
    parser.add_argument("--plain-loop", type=Path, metavar="OUT", help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    load_torchvision()  # before timm, which imports it
    if args.plain_loop:
        plain_loop(args.model, args.weights, args.photos, args.plain_loop, args.batch, args.workers)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save_model(args.model, folder)
        print(describe("jax", "torch", "timm", "pillow"))
        decode_table(224, args.repetitions)
        forward_table(args.model, folder, args.batches, args.repetitions)
        tars = [Path(p) for p in args.photos] or draw_tars(Path(temporary), args.images)
        whole_job_table(args.model, folder, tars, args.batch, args.jobs)


if __name__ == "__main__":
    main()
