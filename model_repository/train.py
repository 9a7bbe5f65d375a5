"""Trains the sample models on scikit-learn's handwritten digits and writes them into this repository."""

import argparse
import logging
import runpy
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # scikit-learn ships no types
from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]  # as above
from torch import Tensor, nn

Floats = npt.NDArray[np.float32]
Predict = Callable[[Floats], Floats]

CLASSES = 10
SIDE = 8
FULL_INK = 16  # the digits' pixels are 0..16
LEAST_ACCURACY = 0.97
LARGEST_DIFFERENCE = 1e-5
OPSET = 18
HIDDEN = 96
BATCH = 64  # images a training step
BATCH_SIZES = (0, 1, 2, 7)


class DigitReader(nn.Module):
    """A small convolutional network: ``image`` [batch, 64] of raw pixels to probabilities [batch, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * (SIDE // 2) ** 2, 64),
            nn.ReLU(),
            nn.Linear(64, CLASSES),
        )

    def answer(self, image: Tensor) -> Tensor:
        """What the softmax is taken of, [batch, 10]."""
        answer: Tensor = self.layers((image / FULL_INK).reshape(-1, 1, SIDE, SIDE))
        return answer

    def scores(self, image: Tensor) -> Tensor:
        """The answers to train, [batch, 1, 10]: one for each image."""
        return self.answer(image).unsqueeze(1)

    def forward(self, image: Tensor) -> Tensor:
        """The probability of each digit; the argument's name is the served input's."""
        return torch.softmax(self.answer(image), dim=-1)


class RowReader(nn.Module):
    """A recurrent network: the image's ``rows`` [batch, time, 8], top first, to probabilities [batch, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.GRU(SIDE, HIDDEN, batch_first=True)
        self.answer = nn.Linear(HIDDEN, CLASSES)

    def answers(self, rows: Tensor) -> Tensor:
        """What the softmax is taken of, [batch, time + 1, 10]: before the first row and after each."""
        blank_first = nn.functional.pad(rows / FULL_INK, (0, 0, 1, 0))
        states, _ = self.memory(blank_first)
        answers: Tensor = self.answer(states)
        return answers

    def scores(self, image: Tensor) -> Tensor:
        """The answers to train, [batch, 9, 10]."""
        return self.answers(image.reshape(-1, SIDE, SIDE))

    def forward(self, rows: Tensor) -> Tensor:
        """The probability of each digit after the last row."""
        return torch.softmax(self.answers(rows)[:, -1], dim=-1)


@dataclass(frozen=True)
class Digits:
    """The images, [n, 64] of 0..16, and what they show; a quarter of them is never trained on."""

    images: Tensor
    labels: Tensor
    held_out_images: Floats
    held_out_labels: npt.NDArray[np.int64]


def read_digits(seed: int) -> Digits:
    """The data that scikit-learn carries: nothing is fetched."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(
        images.astype(np.float32), labels.astype(np.int64), test_size=0.25, stratify=labels, random_state=seed
    )
    return Digits(torch.from_numpy(parts[0]), torch.from_numpy(parts[2]), parts[1], parts[3])


def varied(images: Tensor) -> Tensor:
    """The images, each stretched, slanted and moved a little: people do not write in the middle of a box."""
    count = len(images)
    stretch = torch.empty(count, 2).uniform_(0.75, 1.2)
    slant = torch.empty(count, 2).uniform_(-0.2, 0.2)
    move = torch.empty(count, 2).uniform_(-0.15, 0.15)  # of half a side
    maps = torch.stack(
        [
            torch.stack([stretch[:, 0], slant[:, 0], move[:, 0]], dim=1),
            torch.stack([slant[:, 1], stretch[:, 1], move[:, 1]], dim=1),
        ],
        dim=1,
    )
    grid = nn.functional.affine_grid(maps, [count, 1, SIDE, SIDE], align_corners=False)
    moved = nn.functional.grid_sample(images.reshape(count, 1, SIDE, SIDE), grid, align_corners=False)
    unchanged = torch.rand(count, 1) < 0.3
    return torch.where(unchanged, images, moved.reshape(count, -1))


def shuffled(count: int, size: int) -> Iterator[Tensor]:
    """Each index below ``count`` once, in random order, by ``size`` at a time."""
    order = torch.randperm(count)
    for start in range(0, count, size):
        yield order[start : start + size]


def train(name: str, network: DigitReader | RowReader, digits: Digits, epochs: int) -> None:
    """Fit every answer that ``network`` gives, and so a reader of rows after any number of them."""
    steps = epochs * ceil(len(digits.images) / BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    network.train()
    for epoch in range(1, epochs + 1):
        total = 0.0
        for batch in shuffled(len(digits.images), BATCH):
            scores = network.scores(varied(digits.images[batch]))
            wanted = digits.labels[batch].unsqueeze(1).expand(scores.shape[:2])
            loss = nn.functional.cross_entropy(scores.flatten(0, 1), wanted.flatten())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        if epoch % 20 == 0 or epoch == epochs:
            print(f"{name}: epoch {epoch}/{epochs}, loss {total / len(digits.images):.4f}", flush=True)
    network.eval()


def write_digit_reader(network: DigitReader, onnx_path: Path, torch_path: Path) -> None:
    """One exported graph in two forms: ONNX and torch.export."""
    shapes = {"image": {0: torch.export.Dim("batch")}}
    program = torch.export.export(network, (torch.zeros(2, SIDE * SIDE),), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        # They would tell where on this machine torch is installed.
        node.meta.pop("stack_trace", None)
        node.meta.pop("nn_module_stack", None)
    torch_path.parent.mkdir(parents=True, exist_ok=True)
    torch.export.save(program, torch_path)
    exported = torch.onnx.export(
        program,
        input_names=["image"],
        output_names=["probabilities"],
        dynamic_shapes=shapes,
        dynamo=True,
        opset_version=OPSET,
        external_data=False,
        verbose=False,
    )
    assert exported is not None
    model = exported.model_proto
    write_onnx(
        model, "digits", "Handwritten digits: 8x8 raw pixels, 0..16, to the probability of each digit.", onnx_path
    )


def write_row_reader(network: RowReader, path: Path) -> None:
    """The graph is put together by hand: torch's exporter takes a GRU of unknown length apart into a loop.

    ONNX Runtime 1.32 ends its process when a GRU is given no images or no rows. So a blank row goes before the first,
    which the network knows, and a blank image after the last, whose answer is dropped.
    """
    nodes = [
        helper.make_node("Div", ["rows", "full_ink"], ["scaled"]),
        helper.make_node("Pad", ["scaled", "blanks"], ["never_empty"]),
        helper.make_node("Transpose", ["never_empty"], ["by_time"], perm=[1, 0, 2]),
        helper.make_node(
            "GRU",
            ["by_time", "input_weights", "state_weights", "biases"],
            ["", "last_state"],
            hidden_size=HIDDEN,
            linear_before_reset=1,  # as torch computes it
        ),
        helper.make_node("Squeeze", ["last_state", "zero"], ["padded_state"]),
        helper.make_node("Slice", ["padded_state", "zero", "last"], ["state"]),
        helper.make_node("Gemm", ["state", "answer_weights", "answer_biases"], ["scores"], transB=1),
        helper.make_node("Softmax", ["scores"], ["probabilities"], axis=-1),
    ]
    gru = network.memory
    constants: dict[str, npt.NDArray[np.generic]] = {
        "full_ink": np.array(FULL_INK, dtype=np.float32),
        "blanks": np.array([0, 1, 0, 1, 0, 0]),  # before and then after each of batch, time, pixels
        "zero": np.array([0]),
        "last": np.array([-1]),
        "input_weights": onnx_gates(gru.weight_ih_l0)[np.newaxis],
        "state_weights": onnx_gates(gru.weight_hh_l0)[np.newaxis],
        "biases": np.concatenate([onnx_gates(gru.bias_ih_l0), onnx_gates(gru.bias_hh_l0)])[np.newaxis],
        "answer_weights": network.answer.weight.detach().numpy(),
        "answer_biases": network.answer.bias.detach().numpy(),
    }
    graph = helper.make_graph(
        nodes,
        "digits_rows",
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["batch", "time", SIDE])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    described = (
        "Handwritten digits read row by row: any number of rows of 8 raw pixels to the probability of each digit."
    )
    write_onnx(model, "digits_rows", described, path)


def onnx_gates(parameters: Any) -> Floats:
    """A GRU's weights or biases with the gates in ONNX's order, update-reset-new; torch has reset-update-new.

    ``parameters`` is a tensor, which torch's type of an attribute does not promise.
    """
    reset, update, new = parameters.detach().numpy().reshape(3, HIDDEN, -1)
    gates: Floats = np.concatenate([update, reset, new])
    return gates.reshape(parameters.shape)


def write_onnx(model: onnx.ModelProto, name: str, described: str, path: Path) -> None:
    """Write the graph and nothing of the machine it was made on."""
    model.producer_name = "headrace/model_repository/train.py"
    model.producer_version = ""
    model.doc_string = described
    model.graph.name = name
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    del model.graph.value_info[:]  # inferred again by whoever loads it
    parts: list[Any] = [*model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.output]
    for part in parts:
        part.doc_string = ""
        del part.metadata_props[:]
    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save_model(model, path)


def onnx_predict(path: Path) -> Predict:
    """The model in ``path`` as ONNX Runtime answers."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def predict(images: Floats) -> Floats:
        answer: Floats = session.run(["probabilities"], {name: images})[0]
        return answer

    return predict


def torch_predict(module: nn.Module) -> Predict:
    """What ``module`` answers."""

    @torch.no_grad()
    def predict(images: Floats) -> Floats:
        answer: Floats = module(torch.from_numpy(images)).numpy()
        return answer

    return predict


def check_same(name: str, given: Predict, wanted: Predict, inputs: Floats) -> None:
    """Refuse a written file that does not answer as it should, at several batch sizes."""
    for size in (*BATCH_SIZES, len(inputs)):
        difference = float(np.abs(given(inputs[:size]) - wanted(inputs[:size])).max(initial=0))
        if difference > LARGEST_DIFFERENCE:
            sys.exit(f"{name}: differs by {difference:.1e} from what it was made of, at batch size {size}")


def accuracy(predict: Predict, inputs: Floats, labels: npt.NDArray[np.int64]) -> float:
    """The share of ``inputs`` whose most probable digit is the right one."""
    return float((predict(inputs).argmax(axis=1) == labels).mean())


def check_accuracy(name: str, measured: float) -> None:
    """Print it; refuse a network that has not learnt."""
    print(f"{name}: accuracy {measured:.4f} on held-out digits")
    if measured < LEAST_ACCURACY:
        sys.exit(f"{name}: accuracy {measured:.4f}, expected {LEAST_ACCURACY} or more; nothing was written")


def prepared(images: Floats, preparer: Path) -> Floats:
    """The digits drawn large and off the middle of a bigger picture, and made small again by ``digits_prepare``."""
    # run_path leaves no cache folder behind in the repository.
    model = runpy.run_path(str(preparer))["Model"]()
    pictures = np.zeros((len(images), 200, 240), dtype=np.uint8)
    enlarged = np.kron(images.reshape(-1, SIDE, SIDE), np.ones((15, 15)))
    pictures[:, 20:140, 30:150] = np.rint(enlarged * (255 / FULL_INK))
    return np.concatenate([model.infer({"picture": picture})["image"] for picture in pictures])


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    here = Path(__file__).resolve().parent
    parser.add_argument(
        "--repository", type=Path, default=here, help="where to write the models (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=120, help="passes over the digits (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the training (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Train, check, write, and check what was written."""
    arguments = parse_arguments()
    started_at = time.monotonic()
    # On one thread, sums are always added in the same order: the same seed gives the same files.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(mode=True)
    torch.manual_seed(arguments.seed)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it tells of torchvision's absence
    warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")  # torch's own, on export

    digits = read_digits(arguments.seed)
    images, labels = digits.held_out_images, digits.held_out_labels
    rows = images.reshape(-1, SIDE, SIDE)
    digit_reader, row_reader = DigitReader(), RowReader()
    train("digits", digit_reader, digits, arguments.epochs)
    train("digits_rows", row_reader, digits, arguments.epochs)
    check_accuracy("digits", accuracy(torch_predict(digit_reader), images, labels))
    check_accuracy("digits_rows", accuracy(torch_predict(row_reader), rows, labels))

    onnx_path = arguments.repository / "digits/1/model.onnx"
    torch_path = arguments.repository / "digits_torch/1/model.pt2"
    rows_path = arguments.repository / "digits_rows/1/model.onnx"
    write_digit_reader(digit_reader, onnx_path, torch_path)
    write_row_reader(row_reader, rows_path)

    exported = torch.export.load(torch_path).module()
    check_same("digits", onnx_predict(onnx_path), torch_predict(digit_reader), images)
    check_same("digits_torch", torch_predict(exported), onnx_predict(onnx_path), images)
    print(f"digits, digits_torch: the files answer alike, within {LARGEST_DIFFERENCE:.0e}")
    for count in range(SIDE + 1):
        check_same(f"digits_rows, {count} rows", onnx_predict(rows_path), torch_predict(row_reader), rows[:, :count])
        measured = accuracy(onnx_predict(rows_path), rows[:, :count], labels)
        print(f"digits_rows: accuracy {measured:.4f} after {count} rows")
    small = prepared(images, Path(__file__).resolve().parent / "digits_prepare/1/model.py")
    measured = accuracy(onnx_predict(onnx_path), small, labels)
    print(f"digits_prepare and digits: accuracy {measured:.4f} on held-out digits drawn large")
    print(f"done in {time.monotonic() - started_at:.0f} s")


if __name__ == "__main__":
    main()
