"""Laws of the training loop, on data small enough to train in a second."""

from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import combined
from small import CONFIG, Kind, checkpoints_in, losses, small, started, with_epochs

from capexp.captioning.captioner import Captioner
from capexp.captioning.evaluation import cross_entropy
from capexp.distributed import choose_device
from capexp.errors import InputError
from capexp.settings import DecodingConfig, ModelConfig, Order, TrainingConfig
from capexp.training.checkpoints import Checkpoints, TrainingState
from capexp.training.loop import Epoch
from capexp.training.steps import CapturedSteps, PackedSteps
from capexp.training.teacher_forcing import CrossEntropy

KINDS = [("attention", "photos"), ("merge", "captions")]
WAYS = {"packed": PackedSteps, "as on a GPU": CapturedSteps}
kinds = pytest.mark.parametrize(("decoder", "order"), KINDS)


class Task:
    """A new training and its folder."""

    def __init__(self, folder: Path, keep: int = 1, decoder: Kind = "merge", order: Order = "captions") -> None:
        self.training = small(decoder, order)
        self.checkpoints = checkpoints_in(folder, keep)

    def started(self, config: TrainingConfig = CONFIG, seed: int = 1) -> Generator[Epoch, None, None]:
        return started(self.training, self.checkpoints, config, seed)

    def epochs(self, config: TrainingConfig = CONFIG, seed: int = 1) -> list[Epoch]:
        return list(self.started(config, seed))


@pytest.fixture
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A way to take steps, by its name."""

    monkeypatch.setattr("small.CrossEntropy", partial(CrossEntropy, make_steps=WAYS[request.param]))


def by_way(names: str, *axes: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrise a test by decoder, order and further axes, in each way to take steps."""
    return pytest.mark.parametrize(
        f"way, decoder, order, {names}", combined(list(WAYS), KINDS, *axes), indirect=["way"]
    )


@kinds
def test_it_learns_to_look_at_the_photo(tmp_path: Path, decoder: Kind, order: Order) -> None:
    task = Task(tmp_path, decoder=decoder, order=order)
    epochs = task.epochs(with_epochs(12))
    assert epochs[-1].dev_loss < 0.6 * epochs[0].dev_loss


def test_the_same_seed_gives_the_same_losses_and_another_seed_others(tmp_path: Path) -> None:
    one = Task(tmp_path / "a").epochs()
    torch.rand(5)  # whatever else draws from torch's generator changes nothing
    assert losses(one) == losses(Task(tmp_path / "b").epochs())
    assert losses(one) != losses(Task(tmp_path / "c").epochs(seed=2))


def test_training_leaves_torchs_generator_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    Task(tmp_path).epochs(with_epochs(1))
    assert torch.equal(torch.rand(2), expected)


@by_way("stop_after, average", [(1, 0.0), (2, 0.9), (3, 0.0)])
@pytest.mark.usefixtures("way")
def test_stopped_and_resumed_it_gives_the_losses_of_the_undisturbed_training(
    tmp_path: Path, decoder: Kind, order: Order, average: float, stop_after: int
) -> None:
    config = with_epochs(4, average=average, label_smoothing=average / 9, schedule="cosine")
    undisturbed = Task(tmp_path / "whole", 1, decoder, order).epochs(config)
    stopped = Task(tmp_path / "parts", 1, decoder, order)
    running = stopped.started(config)
    for _ in range(stop_after):
        next(running)
    running.close()
    resumed = Task(tmp_path / "parts", 1, decoder, order)
    assert losses(resumed.epochs(config)) == losses(undisturbed)
    whole, parts = Task(tmp_path / "whole").checkpoints.best(), resumed.checkpoints.best()
    assert whole is not None
    assert parts is not None
    assert whole.name == parts.name
    assert (whole / "decoder.safetensors").read_bytes() == (parts / "decoder.safetensors").read_bytes()


@by_way("average", [0.0, 0.9])
@pytest.mark.usefixtures("way")
def test_stopped_after_every_state_it_gives_the_losses_of_the_undisturbed_training(
    tmp_path: Path, decoder: Kind, order: Order, average: float
) -> None:
    config = with_epochs(3, average=average, schedule="cosine", save_steps=3)
    whole = Task(tmp_path / "whole", 1, decoder, order)
    undisturbed = whole.epochs(config)
    parts, resumed = sittings(lambda: Task(tmp_path / "parts", 1, decoder, order), config)
    assert losses(resumed) == losses(undisturbed)
    assert len(whole.training.train) == 10
    assert parts == 3 * 4 + 1, "states after steps 3, 6, 9 and at the end of each epoch, and a last sitting"
    best, theirs = whole.checkpoints.best(), Checkpoints(tmp_path / "parts", 1).best()
    assert best is not None and theirs is not None
    assert best.name == theirs.name
    assert (best / "decoder.safetensors").read_bytes() == (theirs / "decoder.safetensors").read_bytes()


class Stopped(Exception):
    """Raised when a state is on disk."""


class Stopping(Checkpoints):
    """Saves one state and stops."""

    def save_state(self, state: TrainingState) -> None:
        super().save_state(state)
        raise Stopped


def sittings(make: Callable[[], Task], config: TrainingConfig) -> tuple[int, list[Epoch]]:
    """Trains in sittings that each end at the first state saved: how many there were, and the epochs of the last."""
    for number in count(1):
        task = make()
        task.checkpoints = Stopping(task.checkpoints.folder, task.checkpoints.keep)
        with suppress(Stopped):
            return number, task.epochs(config)
    raise AssertionError


def test_within_an_epoch_the_seconds_of_all_sittings_count(tmp_path: Path) -> None:
    config = with_epochs(1, save_steps=2)
    _, (epoch,) = sittings(lambda: Task(tmp_path), config)
    state = torch.load(tmp_path / "previous.pt", weights_only=True)
    assert state["progress"]["steps"] == 8
    assert 0 < state["progress"]["seconds"] < epoch.seconds


@by_way("average", [0.0, 0.9])
@pytest.mark.usefixtures("way")
def test_the_bundle_on_disk_is_the_epoch_its_name_tells(
    tmp_path: Path, decoder: Kind, order: Order, average: float
) -> None:
    task = Task(tmp_path, 1, decoder, order)
    epochs = task.epochs(with_epochs(4, average=average))
    best = min(epochs, key=lambda epoch: epoch.dev_loss)
    bundle = task.checkpoints.best()
    assert bundle is not None
    assert bundle.name == f"ep{best.number:03d}-train{best.train_loss:.3f}-dev{best.dev_loss:.3f}"
    saved = Captioner.load(bundle)
    assert cross_entropy(saved.decoder, task.training.dev.in_order()).per_token == best.dev_loss


@pytest.mark.parametrize("keep", [1, 2])
def test_disk_holds_as_many_improvements_as_are_kept(tmp_path: Path, keep: int) -> None:
    epochs = Task(tmp_path, keep).epochs()
    improved = [epoch.number for epoch in epochs if epoch.improved]
    names = sorted(path.name[:5] for path in tmp_path.glob("ep*"))
    before_last = [number for number in improved if number < epochs[-1].number][-1:]  # of the previous state
    assert names == [f"ep{number:03d}" for number in sorted({*improved[-keep:], *before_last})]
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["last.pt", "previous.pt"]


def test_label_smoothing_is_minimised_and_not_reported(tmp_path: Path) -> None:
    # A step that moves nothing tells what is reported: the same, smoothed or not.
    still = [Task(tmp_path / str(s)).epochs(with_epochs(1, learning_rate=1e-12, label_smoothing=s)) for s in (0, 0.5)]
    assert still[0][0].train_loss == pytest.approx(still[1][0].train_loss, abs=1e-6)
    moved = [Task(tmp_path / f"m{s}").epochs(with_epochs(3, label_smoothing=s)) for s in (0, 0.5)]
    assert abs(moved[0][-1].train_loss - moved[1][-1].train_loss) > 0.01


def test_the_captioner_is_the_mean_of_the_weights_as_defined(tmp_path: Path) -> None:
    """With all but the newest weights forgotten it is the plain training; a long mean lags behind it."""
    plain = Task(tmp_path / "plain").epochs()
    short = Task(tmp_path / "short").epochs(with_epochs(4, average=1e-9))
    long = Task(tmp_path / "long").epochs(with_epochs(4, average=0.99))
    assert [epoch.train_loss for epoch in long] == [epoch.train_loss for epoch in plain]
    assert [epoch.dev_loss for epoch in short] == pytest.approx([epoch.dev_loss for epoch in plain], abs=1e-5)
    assert abs(long[0].dev_loss - plain[0].dev_loss) > 1e-3


def test_it_stops_when_patience_is_at_its_end(tmp_path: Path) -> None:
    too_fast = with_epochs(30, patience=2, learning_rate=3.0)
    epochs = Task(tmp_path).epochs(too_fast)
    assert len(epochs) < 30
    assert [epoch.improved for epoch in epochs[-2:]] == [False, False]
    best = min(epochs, key=lambda epoch: epoch.dev_loss)
    assert best.number == len(epochs) - 2


def test_improved_means_lower_than_all_before(tmp_path: Path) -> None:
    epochs = Task(tmp_path).epochs(with_epochs(8, learning_rate=0.05))
    for i, epoch in enumerate(epochs):
        assert epoch.improved == all(epoch.dev_loss < past.dev_loss for past in epochs[:i])


def test_a_loss_that_is_not_finite_stops_before_the_update_and_tells_the_step(tmp_path: Path) -> None:
    task = Task(tmp_path)
    decoder = task.training.decoder
    with torch.no_grad():
        decoder.vocabulary.bias[5] = torch.inf
    before = decoder.vocabulary.weight.clone()
    with pytest.raises(InputError, match=r"nan at step 1 of epoch 1.*training\.learning_rate"):
        task.epochs()
    assert torch.equal(decoder.vocabulary.weight, before)
    assert task.checkpoints.best() is None


@pytest.mark.parametrize("killed_in", [1, 2, 3])
def test_a_captioner_that_no_state_knows_of_is_not_the_best(tmp_path: Path, killed_in: int) -> None:
    """Killed when an improvement is on disk and its state is not, a training may go on for fewer epochs than that."""
    task, states = Task(tmp_path), {}
    for epoch in task.started():
        assert epoch.improved, "else there is nothing to try here"
        if epoch.number == killed_in - 1:
            states = {path: path.read_bytes() for path in tmp_path.glob("*.pt")}
        if epoch.number == killed_in:
            break
    for path in tmp_path.glob("*.pt"):
        path.unlink()
    for path, content in states.items():
        path.write_bytes(content)
    short = max(killed_in - 1, 1)
    epochs = Task(tmp_path).epochs(with_epochs(short))
    assert [epoch.number for epoch in epochs] == list(range(1, short + 1))
    best = task.checkpoints.best()
    assert best is not None
    assert best.name.startswith(f"ep{short:03d}-")
    assert losses(Task(tmp_path).epochs()) == losses(Task(tmp_path / "whole").epochs())


def test_each_state_finds_its_captioner_at_any_time(tmp_path: Path) -> None:
    task = Task(tmp_path)
    for epoch in task.started(with_epochs(12, patience=12, learning_rate=0.05)):
        for state in sorted(tmp_path.glob("*.pt")):  # last.pt, then the one before it
            found = task.checkpoints.latest()
            assert found is not None
            assert found.epochs == epoch.number - (state.name == "previous.pt")
            state.rename(state.with_suffix(".aside"))
        for aside in tmp_path.glob("*.aside"):
            aside.rename(aside.with_suffix(".pt"))


def test_states_that_are_junk_are_one_fault_and_stay_as_they_are(tmp_path: Path) -> None:
    Task(tmp_path).epochs(with_epochs(2))
    junk = {"last.pt": b"junk", "previous.pt": b""}
    for name, content in junk.items():
        (tmp_path / name).write_bytes(content)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"no state to resume from.*last\.pt.*previous\.pt.*start a new run"):
        Task(tmp_path).epochs()
    assert sorted(tmp_path.iterdir()) == before
    assert {name: (tmp_path / name).read_bytes() for name in junk} == junk


def test_a_state_whose_captioner_is_damaged_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    undisturbed = Task(tmp_path / "whole").epochs()
    task = Task(tmp_path / "parts")
    assert task.epochs(with_epochs(3, patience=4))[-1].improved, "else there is nothing to try here"
    best = task.checkpoints.best()
    assert best is not None
    (best / "decoder.safetensors").write_bytes(b"damaged")
    assert losses(Task(tmp_path / "parts").epochs()) == losses(undisturbed)
    assert "its captioner is damaged" in caplog.text
    best = task.checkpoints.best()
    assert best is not None
    Captioner.load(best)


def test_a_state_of_other_shapes_is_refused_in_one_line(tmp_path: Path) -> None:
    Task(tmp_path).epochs(with_epochs(1))
    other = Task(tmp_path)
    config = ModelConfig(embedding_size=8, lstm_units=8)
    words, encoder = other.training.captioner.vocabulary, other.training.captioner.encoder_identity
    captioner = Captioner.fresh(config, words, encoder, DecodingConfig(), seed=1)
    other.training = replace(other.training, captioner=captioner)
    with pytest.raises(InputError, match="does not fit the settings") as caught:
        other.epochs()
    assert "\n" not in str(caught.value)


def test_captioners_without_any_state_are_not_trained_over(tmp_path: Path) -> None:
    Task(tmp_path).epochs(with_epochs(2))
    for state in tmp_path.glob("*.pt"):
        state.unlink()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"last\.pt is missing"):
        Task(tmp_path).epochs()
    assert sorted(tmp_path.iterdir()) == before


def test_a_damaged_state_is_passed_over_for_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    undisturbed = Task(tmp_path / "whole").epochs()
    Task(tmp_path / "parts").epochs(with_epochs(3, patience=4))
    last = tmp_path / "parts" / "last.pt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 0xFF
    last.write_bytes(content)
    assert losses(Task(tmp_path / "parts").epochs()) == losses(undisturbed)
    assert "last.pt" in caplog.text
    assert "passed over" in caplog.text


def test_a_device_that_is_not_there_is_refused() -> None:
    for name in ("cuda:99", "quantum"):
        with pytest.raises(InputError, match=rf"training\.device = '{name}'"):
            choose_device(name)


def test_epochs_carry_their_targets_by_second(tmp_path: Path) -> None:
    task = Task(tmp_path)
    epoch = task.epochs(with_epochs(1))[0]
    assert epoch.tokens_per_second > 0
    assert task.training.train.targets / epoch.tokens_per_second < epoch.seconds
