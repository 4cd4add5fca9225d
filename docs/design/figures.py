"""Draw the figures of docs/design: `python docs/design/figures.py` writes an SVG for each page.

They have a light background of their own, so that they are readable on a dark page too.
"""

from html import escape
from pathlib import Path

INK, GREY, LINE, PAPER = "#1f2933", "#52606d", "#9aa5b1", "#fbfbf8"
COLOURS = ("#bfe3de", "#fde3b3", "#d5d6f5", "#f8cfd3")  # of image blocks and of streams
SAFE, LOST = "#0b7a6f", "#b3261e"


class Figure:
    """An SVG that is written element by element; lengths are pixels."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.size, self.title, self.elements = (width, height), title, []

    def box(self, x, y, width, height, fill="#ffffff", stroke=LINE, dash=""):
        self.elements.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="4" fill="{fill}" stroke="{stroke}"'
            f"{f' stroke-dasharray={dash!r}' if dash else ''}/>".replace("'", '"')
        )

    def text(self, x, y, text, anchor="middle", size=13, fill=INK, bold=False):
        weight = ' font-weight="600"' if bold else ""
        self.elements.append(
            f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" fill="{fill}"{weight}>'
            f"{escape(text)}</text>"
        )

    def line(self, *points, stroke=GREY, arrow=True, dash="", width=1.5):
        path = "M" + " L".join(f"{x} {y}" for x, y in points)
        head = f' marker-end="url(#{"safe" if stroke == SAFE else "grey"})"' if arrow else ""
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self.elements.append(
            f'<path d="{path}" fill="none" stroke="{stroke}" stroke-width="{width}"{dashes}{head}/>'
        )

    def cell(self, x, y, width, height, text, fill="#ffffff", size=13):
        self.box(x, y, width, height, fill)
        lines = text.split("\n")
        for number, words in enumerate(lines):
            self.text(
                x + width / 2, y + height / 2 + 4.5 + 17 * (number - (len(lines) - 1) / 2), words, size=size
            )

    def notes(self, y, *lines):
        for number, line in enumerate(lines):
            self.text(20, y + 17 * number, line, "start", 12, GREY)

    def svg(self) -> str:
        width, height = self.size
        heads = "".join(
            f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0 L8 4 L0 8 Z" fill="{colour}"/></marker>'
            for name, colour in (("grey", GREY), ("safe", SAFE))
        )
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
                f'height="{height}" role="img" font-family="system-ui, sans-serif">',
                f"<title>{escape(self.title)}</title>",
                f"<defs>{heads}</defs>",
                f'<rect width="{width}" height="{height}" rx="8" fill="{PAPER}"/>',
                *self.elements,
                "</svg>\n",
            ]
        )


def loss() -> Figure:
    figure = Figure(
        760, 330, "Image blocks rotate over four devices; texts stay, in four steps all pairs meet"
    )
    for step in range(4):
        figure.text(195 + 150 * step, 32, f"step {step}", bold=True)
    for device in range(4):
        y = 48 + 54 * device
        figure.text(20, y + 25, f"device {device}", "start", bold=True)
        for step in range(4):
            block, x = (device - step) % 4, 125 + 150 * step
            figure.cell(x, y, 44, 38, f"I{block}", COLOURS[block])
            figure.text(x + 52, y + 24, "x")
            figure.cell(x + 60, y, 64, 38, f"texts {device}")
            if step < 3:  # to the next device
                sent = ((x + 22, y + 38), (x + 22, y + 46), (x + 137, y + 46))
                figure.line(
                    *sent, *(((x + 137, y + 73), (x + 148, y + 73)) if device < 3 else ()), arrow=device < 3
                )
                if device == 0:
                    figure.line((x + 137, y - 8), (x + 137, y + 19), (x + 148, y + 19))
    figure.notes(
        288,
        "Ik: the image block of device k. ppermute passes it on before it is used, so that the transfer overlaps with",
        "the products. Each x is scanned in tiles; texts and their gradients stay. Device 3 sends to device 0.",
    )
    return figure


def stream() -> Figure:
    figure = Figure(
        760, 290, "Three shuffle streams; a batch takes the next rows of the current window of each"
    )
    windows = (
        (("7", 2), ("2, 12", 4), ("5, 10", 3)),
        (("0, 9", 4), ("14, 3", 4), ("13", 1)),
        (("4", 1), ("11, 8", 4), ("1, 15", 4)),
    )
    left, width = 110, 68
    for step in range(9):
        figure.text(left + width * (step + 0.5), 32, f"{step}", bold=True)
    figure.text(20, 32, "step", "start", bold=True)
    for row, (colour, lists) in enumerate(zip(COLOURS, windows, strict=False)):
        y, step = 48 + 50 * row, 0
        figure.text(20, y + 24, f"stream {row}", "start", bold=True)
        for blocks, length in lists:
            figure.cell(left + width * step + 2, y, width * length - 4, 38, blocks, colour)
            step += length
    figure.box(left + width - 1, 42, width + 2, 152, "none", INK, "5 4")
    figure.line((left + 1.5 * width, 196), (left + 1.5 * width, 218))
    for row, (blocks, colour) in enumerate(zip(("7", "0, 9", "11, 8"), COLOURS, strict=False)):
        figure.cell(left + 168 * row, 224, 160, 30, f"rows of {blocks}", colour)
    figure.text(20, 243, "batch 1", "start", bold=True)
    figure.notes(
        277, "A box is a window: blocks of 1024 rows in memory together. The first windows differ in length."
    )
    return figure


def step() -> Figure:
    figure = Figure(
        760, 350, "The forward pass writes what each layer keeps once, the backward pass reads it"
    )
    figure.text(130, 30, "forward, each microbatch", bold=True)
    figure.text(620, 30, "backward, each microbatch", bold=True)
    own, flax = COLOURS[0], "#ffffff"
    rows = (44, 124, 254)
    figure.cell(30, rows[0], 200, 44, "token table, positions", flax)
    figure.cell(30, rows[1], 200, 94, "each scanned layer:\nEncoderPass.forward", own)
    figure.cell(30, rows[2], 200, 44, "last layer, pooling, head", flax)
    figure.cell(520, rows[0], 200, 44, "token table, positions", flax)
    figure.cell(520, rows[1], 200, 94, "each scanned layer, last first:\nEncoderPass.backward", own)
    figure.cell(520, rows[2], 200, 44, "last layer, pooling, head", flax)
    for x, down in ((130, True), (620, False)):
        for top, bottom in ((88, 124), (218, 254)):
            figure.line((x, top), (x, bottom)) if down else figure.line((x, bottom), (x, top))
    figure.cell(290, 134, 170, 74, "kept\n[microbatch, layer]", COLOURS[1])
    figure.line((230, 171), (288, 171))
    figure.line((460, 171), (518, 171))
    figure.text(259, 160, "write", size=12, fill=GREY)
    figure.text(489, 160, "read", size=12, fill=GREY)
    figure.cell(290, 254, 170, 44, "loss on the ring", flax)
    figure.line((230, 276), (288, 276))
    figure.line((460, 276), (518, 276))
    figure.cell(290, 44, 170, 44, "sums of gradients", COLOURS[1])
    figure.line((518, 66), (462, 66))
    figure.line((545, 124), (440, 90))
    figure.text(504, 106, "added in place", "start", size=12, fill=GREY)
    figure.box(30, 318, 16, 16, own)
    figure.text(54, 331, "passes by hand", "start", 12, GREY)
    figure.box(170, 318, 16, 16, flax)
    figure.text(194, 331, "Flax, jax.vjp", "start", 12, GREY)
    figure.box(310, 318, 16, 16, COLOURS[1])
    figure.text(334, 331, "carries of the loops, written where they are", "start", 12, GREY)
    return figure


def resume() -> Figure:
    figure = Figure(
        760, 300, "A run is killed after step 1002 and continues from the checkpoint of step 1000"
    )
    left, width = 120, 74
    steps = (998, 999, 1000, 1001, 1002)
    figure.text(20, 60, "first process", "start", bold=True)
    for number, name in enumerate(steps):
        figure.cell(
            left + width * number, 40, width - 8, 34, f"{name}", COLOURS[0] if name <= 1000 else COLOURS[3]
        )
    figure.text(left + width * 5 + 8, 62, "killed", "start", fill=LOST, bold=True)
    figure.line((left + width * 3 - 4, 78), (left + width * 3 - 4, 118), stroke=SAFE)
    figure.cell(left + width * 3 - 94, 122, 180, 44, "evaluate, save,\ncommit checkpoint 1000", COLOURS[1])
    figure.line(
        (left + width * 3 + 86, 144),
        (left + width * 5 + 33, 144),
        (left + width * 5 + 33, 196),
        (left + width * 3 + 20, 196),
        (left + width * 3 + 20, 206),
        stroke=SAFE,
    )
    figure.text(left + width * 5 + 42, 162, "restore: parameters,", "start", 12, GREY)
    figure.text(left + width * 5 + 42, 178, "optimizer, step, average", "start", 12, GREY)
    figure.text(20, 232, "same command", "start", bold=True)
    for number, name in enumerate((1001, 1002, 1003, 1004)):
        figure.cell(left + width * (3 + number), 210, width - 8, 34, f"{name}", COLOURS[0])
    figure.notes(
        272,
        "The batch of a step is a function of (seed, step): 1001 and 1002 are repeated with the same bits,",
        "and their lines of metrics.jsonl are written again.",
    )
    return figure


def storage() -> Figure:
    figure = Figure(760, 330, "The object that makes something exist is written last")
    rows = (
        (
            "embed: a shard",
            (
                "take the\nlease",
                "copies of\nthe journal",
                "the shard,\none object",
                "manifest",
                "delete the\njournal",
            ),
            3,
            "killed before it: the next machine continues from the journal",
        ),
        (
            "train: a save",
            (
                "push\nmetrics",
                "files of the\ncheckpoint",
                "",
                "checkpoints/\n<step>.json",
                "delete the\nold marker",
            ),
            3,
            "killed before it: the checkpoint before is used",
        ),
        (
            "index --append",
            ("new files\nof records", "skipped\nentries", "", "dataset.json", "delete old\nrecords"),
            3,
            "killed before it: the old dataset is whole",
        ),
    )
    for number, (name, objects, last, lost) in enumerate(rows):
        y = 46 + 92 * number
        figure.text(20, y + 28, name, "start", bold=True)
        before = None
        for place, words in enumerate(objects):
            if not words:
                continue
            x = 140 + 122 * place
            figure.cell(x, y, 104, 46, words, COLOURS[0] if place == last else "#ffffff")
            if before is not None:
                figure.line((before + 104, y + 23), (x - 2, y + 23))
            before = x
        figure.text(140, y + 66, lost, "start", 12, LOST)
        figure.text(140 + 122 * last + 226, y + 66, "exists", "end", 12, SAFE)
        figure.line((140 + 122 * last + 52, y + 62), (140 + 122 * last + 170, y + 62), stroke=SAFE)
    figure.text(140 + 122 * 3 + 52, 30, "written last", size=12, fill=SAFE, bold=True)
    return figure


if __name__ == "__main__":
    for draw in (loss, stream, step, resume, storage):
        Path(__file__).with_name(f"{draw.__name__}.svg").write_text(draw().svg())
