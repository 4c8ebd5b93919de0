"""Labels are the attention they claim to be; a head learns from them; its quality measure is the textbook one; and
every stage takes up where it was interrupted."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from kvlib.errors import ConfigError
from kvlib.fitted import check_fitted, fill, load_fitted, save_fitted
from kvlib.models import TINY, Reasoner, load_reasoner
from kvlib.policies import make_policy
from kvlib.policies.dynts import ImportanceHead
from kvlib.record import SampleLog
from kvlib.tasks.training import right_answer, training_problems
from kvlib.train import labels as labels_module
from kvlib.train import predictor as predictor_module
from kvlib.train import reasoner as reasoner_module
from kvlib.train.__main__ import main
from kvlib.train.labels import features_and_labels, label_traces
from kvlib.train.predictor import HeldOut, evaluate_head, rows_of, train_head
from kvlib.train.recipe import Profile, load_profile
from kvlib.train.traces import Trace, as_trace, stage_traces

PROFILES = Path(__file__).parents[2] / "notebooks" / "predictors.yml"


RECKONED = dict.fromkeys(("hidden_size", "bytes_per_feature", "tokens_per_trace", "prompt_tokens"), 8)
RECKONED |= dict.fromkeys(("usable", "decode_rate", "label_rate", "train_rate"), 0.5) | {"source": "made up"}


class Interrupted(Exception):
    pass


def interrupted_after(n: int, original):
    """original, raising Interrupted once it has run n times."""
    calls = []

    def call(*arguments, **named):
        original(*arguments, **named)
        calls.append(arguments)
        if len(calls) == n:
            raise Interrupted

    return call


def random_data(n_traces: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(16, generator=generator)
    features = [torch.randn(60, 16, generator=generator) for _ in range(n_traces)]
    return [(f, torch.exp(f @ direction)) for f in features]


@pytest.fixture(scope="module")
def tiny() -> Reasoner:
    return load_reasoner("tiny")


@pytest.mark.parametrize("n_rows", [256, 3])
def test_labels_equal_the_eager_attention_of_the_answer(any_model, n_rows):
    ids = tuple(torch.randint(0, 64, (30,), generator=torch.Generator().manual_seed(3)).tolist())
    trace = Trace(ids, n_prompt=6, answer_at=22)
    features, labels = features_and_labels(any_model, trace, n_rows)
    any_model.set_attn_implementation("eager")
    out = any_model(torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
    any_model.set_attn_implementation("kvlib")
    attention = torch.stack(out.attentions)[:, 0, :, 22:]
    torch.testing.assert_close(labels.double(), attention.mean((0, 1, 2))[6:21], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(features.double(), out.hidden_states[-1][0, 6:21], rtol=1e-5, atol=1e-6)


def test_a_head_learns_what_can_be_learned_and_is_reproducible():
    data = random_data(30)
    head = train_head(data[:-5], n_epochs=60, batch_tokens=256)
    learned = evaluate_head(head, data[-5:])
    assert learned.spearman > 0.8
    assert learned.top20_recall > 0.6
    again = train_head(data[:-5], n_epochs=60, batch_tokens=256)
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), again.parameters(), strict=True))


def stored_epochs(monkeypatch) -> list[int]:
    """The epochs that trainings from now on finish, in order."""
    epochs, store = [], predictor_module.store

    def noted(*parts, epoch, **numbers):
        epochs.append(epoch)
        store(*parts, epoch=epoch, **numbers)

    monkeypatch.setattr(predictor_module, "store", noted)
    return epochs


@pytest.mark.parametrize("after", [1, 4])
def test_an_interrupted_training_ends_in_the_same_head(tmp_path, monkeypatch, after):
    data, settings = random_data(8), {"n_epochs": 5, "batch_tokens": 100}
    undisturbed = train_head(data, **settings)
    checkpoint = tmp_path / "training.safetensors"
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(predictor_module, "store", interrupted_after(after, predictor_module.store))
        train_head(data, **settings, checkpoint=checkpoint, mark="a")
    epochs = stored_epochs(monkeypatch)
    resumed = train_head(data, **settings, checkpoint=checkpoint, mark="a")
    assert epochs == list(range(after + 1, 6))
    assert all(torch.equal(a, b) for a, b in zip(undisturbed.parameters(), resumed.parameters(), strict=True))


def test_a_checkpoint_of_other_settings_or_a_damaged_one_is_not_continued(tmp_path, monkeypatch):
    data, checkpoint, epochs = random_data(4), tmp_path / "training.safetensors", stored_epochs(monkeypatch)
    for mark in "abb":
        train_head(data, n_epochs=2, checkpoint=checkpoint, mark=mark)
        if mark == "b":
            checkpoint.write_bytes(checkpoint.read_bytes()[:500])
    assert epochs == [1, 2, 1, 2, 1, 2]


def test_a_reasoners_training_is_taken_up_where_it_stopped_and_no_other_is(tmp_path, monkeypatch):
    monkeypatch.setattr(reasoner_module, "TOKENS_PER_BATCH", 256)
    path, undisturbed, first, resumed = tmp_path / "c.safetensors", *(reasoner_module.Trainer(3, 60) for _ in range(3))
    losses = [undisturbed.train_step() for _ in range(4)]
    assert losses[:2] == [first.train_step() for _ in range(2)]
    first.save(path)
    resumed.load(path)
    assert losses[2:] == [resumed.train_step() for _ in range(2)]
    pairs = zip(undisturbed.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(ConfigError, match=r"c.safetensors is damaged, or not of 61 steps with seed 3; delete it or"):
        reasoner_module.Trainer(3, 61).load(path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ConfigError, match=r"c.safetensors is damaged, or not of 60 steps with seed 3; delete it or"):
        first.load(path)


def test_rows_of_parts_are_rows_of_the_whole():
    parts = [torch.randn(n, 3) for n in (4, 1, 7)]
    index = torch.randperm(12)
    assert torch.equal(rows_of(parts, index), torch.cat(parts)[index])


def test_quality_is_rank_correlation_and_recall_of_the_top_fifth():
    class Given(torch.nn.Module):
        def forward(self, x):
            return x[..., 0]

    labels = torch.arange(10.0)
    assert evaluate_head(Given(), [(labels[:, None], labels)]) == HeldOut(1, pytest.approx(1.0), 1.0)
    assert evaluate_head(Given(), [(-labels[:, None], labels)]) == HeldOut(1, pytest.approx(-1.0), 0.0)
    tied = torch.tensor([0.0, 0, 0, 0, 0, 1, 1, 1, 1, 1])  # equals share a rank: 5 / sqrt(82.5 * 62.5 / 25)
    assert evaluate_head(Given(), [(tied[:, None], labels)]).spearman == pytest.approx(0.8704, abs=1e-4)


def test_a_saved_head_comes_back_the_same_file_and_damage_is_named(tmp_path):
    head, path = ImportanceHead(8), tmp_path / "head.safetensors"
    contents = set()
    for _ in range(4):
        assert save_fitted("predictor", head, path, "abc", profile="tiny", n_traces=3) == path
        contents.add(path.read_bytes())
    assert len(contents) == 1
    x = torch.randn(3, 8)
    assert torch.equal(load_fitted("predictor", path, "abc")(x), head(x))
    with pytest.raises(ConfigError, match=r"head.safetensors was made for other weights; make it again with"):
        load_fitted("predictor", path, "abd")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ConfigError, match=r"could not be loaded .*; make it again with `python -m kvlib.train predict"):
        load_fitted("predictor", path)


def test_shards_are_made_once_and_again_when_damaged_or_of_other_traces(qwen2, tmp_path, monkeypatch):
    monkeypatch.setattr(labels_module, "TRACES_PER_SHARD", 2)
    generator = torch.Generator().manual_seed(3)
    traces = [Trace(tuple(torch.randint(0, 64, (n,), generator=generator).tolist()), 6, n - 8) for n in range(30, 35)]
    wanted = [features_and_labels(qwen2, trace) for trace in traces]

    def calls_of(mark, **options) -> tuple[list, int]:
        calls = []

        def counted(*arguments):
            calls.append(1)
            return features_and_labels(*arguments)

        monkeypatch.setattr(labels_module, "features_and_labels", counted)
        return label_traces(qwen2, traces, tmp_path, mark, **options), len(calls)

    for n_calls in (5, 0):
        data, n = calls_of("a")
        assert n == n_calls
        for pair, expected in zip(data, wanted, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(pair, expected, strict=True))
    (tmp_path / "00001.safetensors").write_bytes(b"torn")
    assert calls_of("a")[1] == 2
    assert calls_of("b")[1] == 5
    few, n = calls_of("b", most_tokens=10, n_whole=1)
    assert n == 4  # the last shard holds only a whole trace, so it is the same
    assert [len(labels) for _, labels in few] == [10, 10, 10, 10, len(wanted[-1][1])]
    assert all(set(f[1].tolist()) <= set(w[1].tolist()) for f, w in zip(few, wanted, strict=True))


def test_traces_resume_after_a_kill_without_loss_or_duplicates(tiny, tmp_path, monkeypatch):
    profile = Profile(ends_thinking=".", only_right=False, n_traces=10, n_held_out=1, n_rows=4, max_new_tokens=40)
    problems = training_problems("chains", 10, 0)
    undisturbed, mark = stage_traces(profile, tiny, problems, tmp_path / "undisturbed")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(SampleLog, "append", interrupted_after(4, SampleLog.append))
        stage_traces(profile, tiny, problems, tmp_path / "killed")
    path = tmp_path / "killed" / "samples.jsonl"
    before = path.read_bytes()
    path.write_bytes(before + before[-200:-100])
    resumed, again = stage_traces(profile, tiny, problems, tmp_path / "killed")
    assert path.read_bytes().startswith(before)
    assert len(path.read_text().splitlines()) == 11
    assert (resumed, again) == (undisturbed, mark)
    # Other settings start anew and keep the old traces.
    stage_traces(dataclasses.replace(profile, seed=1), tiny, problems, tmp_path / "killed")
    assert (tmp_path / "killed" / "samples.1.jsonl").read_bytes().startswith(before)
    with pytest.raises(ConfigError, match="of 10 traces are usable, and 10 are held out; raise n_traces"):
        stage_traces(dataclasses.replace(profile, n_held_out=10), tiny, problems, tmp_path / "undisturbed")


def other_weights(tmp_path) -> Path:
    """The tiny model's, as those of another training."""
    weights = tmp_path / "weights"
    weights.mkdir()
    for name in (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        (weights / name).write_bytes((TINY / name).read_bytes())
    (weights / "manifest.json").write_text("{}")
    return weights


def test_what_is_fitted_to_another_model_never_lands_beside_the_shipped_weights(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("kvlib.train.__main__.N_CALIBRATION", 3)
    weights, file = other_weights(tmp_path), "triattention-calibration.safetensors"
    shipped = (TINY / file).read_bytes()
    assert main(["calibration", "--model", str(weights)]) == 0
    assert (TINY / file).read_bytes() == shipped and file in json.loads((weights / "manifest.json").read_text())
    assert main(["calibration", "--model", "smollm2"]) == 2
    assert "'smollm2' is no folder of weights; name its --profile" in capsys.readouterr().err


def test_the_command_writes_a_head_beside_the_weights_of_another_model(tmp_path, capsys):
    weights = other_weights(tmp_path)
    profiles = tmp_path / "profiles.yml"
    profiles.write_text(
        "small: {n_traces: 8, n_held_out: 2, n_rows: 8, n_epochs: 2, max_new_tokens: 40, ends_thinking: ., "
        "only_right: false}"
    )
    options = ["predictor", "--profile", "small", "--profiles", str(profiles), "--model", str(weights)]
    assert main([*options, "--work", str(tmp_path / "work"), "--out", str(weights)]) == 0
    said = capsys.readouterr().out
    assert "usable traces of 8" in said and "held out, 2 traces" in said
    head = weights / "dynts-predictor.safetensors"
    first = head.read_bytes()
    assert json.loads((weights / "manifest.json").read_text())[head.name]
    policy = make_policy("dynts", n_recent=8)
    assert set(check_fitted(policy, str(weights))) == {"predictor"}
    assert fill(policy, str(weights), load_reasoner(str(weights))).predictor.d == 128
    head.unlink()
    assert main([*options, "--work", str(tmp_path / "work"), "--out", str(weights)]) == 0
    assert head.read_bytes() == first


def test_a_plan_needs_no_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("kvlib.train.predictor.load_reasoner", None)
    options = [
        "predictor",
        "--profile",
        "r1-qwen",
        "--profiles",
        str(PROFILES),
        "--work",
        str(tmp_path / "work"),
        "--plan",
    ]
    assert main(options) == 0
    said = capsys.readouterr().out
    for line in ("traces    7500 x", "labels  ", "training  15 epochs", "total  ", "disk  ", "reckoned with: "):
        assert line in said
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("other: {}", "unknown profile"),
        ("tiny: {n_trace: 3}", "did you mean n_traces"),
        ("tiny: {n_traces: many}", "n_traces='many' must be of type int"),
        ("tiny: {expected: {usable: 1}}", "tiny.expected 'hidden_size' is missing; add it"),
        ("tiny: {expected: 3}", "a mapping with the keys hidden_size, .* is needed, got 3"),
        (f"tiny: {{expected: {RECKONED | {'usable': 'half'}}}}", "tiny.expected.usable='half' must be of type float"),
        (f"tiny: {{expected: {RECKONED | {'label_rate': 0}}}}", "tiny.expected.label_rate=0 must be above 0"),
        ("tiny: 3", "must map names of profiles to mappings"),
        ("tiny: [", "is not valid YAML"),
    ],
)
def test_a_wrong_profile_is_named(tmp_path, text, message):
    path = tmp_path / "profiles.yml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_profile(path, "tiny")


@pytest.mark.parametrize("name", ["tiny", "smollm2", "r1-qwen", "r1-llama"])
def test_the_shipped_profiles_are_valid_and_reckoned(name):
    profile, expected = load_profile(PROFILES, name)
    assert expected.source
    assert profile == Profile() or name != "tiny"
    assert profile.top_k == 20 or not name.startswith("r1-"), "else a whole vocabulary is sorted in every step"


class Letters:
    """A reasoner whose tokens are pairs of letters."""

    answer_id = None

    def decode(self, ids) -> str:
        return "".join(chr(97 + i // 26) + chr(97 + i % 26) for i in ids)

    def encode(self, text: str) -> list[int]:
        return [(ord(a) - 97) * 26 + ord(b) - 97 for a, b in zip(text[::2], text[1::2], strict=True)]


@pytest.mark.parametrize(
    ("words", "begins"), [("mn", 6), ("no", 6), ("mnop", 6), ("kl", 5), ("ij", None), ("xy", None)]
)
def test_an_answer_begins_with_the_token_of_its_first_words(words, begins):
    reasoner = Letters()
    tokens = reasoner.encode("abababab" + "ijklmnopkl")
    entry = {"prompt": [1, 2], "tokens": tokens, "n_prompt": 2}
    trace = as_trace(entry, Profile(ends_thinking=words), reasoner)
    assert (trace and trace.answer_at) == (begins and 2 + begins)
    if trace:
        assert trace.thinking == slice(2, 2 + begins)


def test_training_sets_are_reproducible_and_grade_their_own_answers(tmp_path):
    sums = training_problems("sums", 40, 0)
    assert sums == training_problems("sums", 50, 0)[:40] != training_problems("sums", 40, 1)
    assert right_answer(sums[0], f"3 + 4. The answer is: {sums[0].answer}.<|im_end|>")
    assert not right_answer(sums[0], f"The answer is {sums[0].answer}1.")
    path = tmp_path / "own.jsonl"
    path.write_text('{"problem": "1/2?", "solution": "so \\\\boxed{\\\\frac{1}{2}}"}\n{"problem": "b", "answer": 7}\n')
    problems = {problem.question: problem for problem in training_problems(str(path), 2, 0)}
    assert right_answer(problems["1/2?"], "hm </think> it is $\\boxed{\\dfrac{1}{2}}$.")
    assert not right_answer(problems["b"], "\\boxed{7} </think> I do not know")
    with pytest.raises(ConfigError, match="has 2 problems; use at most that"):
        training_problems(str(path), 3, 0)
    with pytest.raises(ConfigError, match="unknown training set 'maths'; did you mean math"):
        training_problems("maths", 3, 0)
    path.write_text("[]\n")
    with pytest.raises(ConfigError, match=r"own.jsonl does not hold one object a line"):
        training_problems(str(path), 1, 0)
