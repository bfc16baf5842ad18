"""Against lm_eval's own `HFLM` on the exported folder: all three kinds of requests, one process and two tensor ranks.

Compared: log-likelihoods to 1e-5 of float32 logits, whether a continuation is the greedy one, rolling log-likelihoods,
greedily generated text; with a tokenizer that adds a beginning to each text (as Llama's) and one that does not (as
GPT-2's), with texts that have to be cut, empty contexts, stop sequences.
Could not run: sampling, whose draws differ by construction; it is held against probabilities in tests/test_generate.py.
"""

import json
import runpy
import socket
import string
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import tokenizers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from megagrow.checkpoint import hf
from megagrow.checkpoint.source import open_source
from megagrow.config import ModelConfig
from megagrow.evaluate.service import Service
from megagrow.evaluate.shared_model import load_shared_model
from megagrow.evaluate.tasks import TaskSettings, evaluate_tasks, lm_eval_model
from megagrow.evaluate.transformers_tokenizer import load_transformers_tokenizer
from megagrow.parallel.mesh import make_inference_mesh
from tests.growth.models import LLAMA, make, tensors_of
from tests.models import as_gpt2
from tests.ranks import run_ranks

VOCAB = 259
MODEL = replace(
    LLAMA, vocab_size=VOCAB, hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=40, max_seq_length=24
)
FAMILIES = {"llama": MODEL, "gpt2": as_gpt2(MODEL)}
TOLERANCE = 1e-5
LONG = "the quick brown fox jumps over the lazy dog, again and again and again"
PAIRS = [
    ("the quick", " brown"),
    ("the quick ", "brown"),  # the space moves to the continuation
    ("the quick", " fox"),
    ("a", "b"),
    ("a", "c"),
    ("", "no context"),
    ("", "<s> its own beginning"[:20]),
    (LONG, " end"),  # cut on the left
    (LONG, "x"),
    ("ünïcödé", " \U0001f600"),
    ("q", LONG[:24]),  # fills the whole context
]
TEXTS = [
    "a",
    "short text",
    LONG,
    LONG * 3,
    LONG[:23],
    LONG[:24],
    LONG[:25],
    LONG[:48],
    LONG[:49],
    "ünïcödé \U0001f600" * 5,
]
CHAT = (
    "{% for turn in messages %}[{{ turn.role }}]{{ turn.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
GREEDY: dict[str, Any] = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False, "temperature": 0.0}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network at all, not even a try."""

    def refuse(*_: object) -> None:
        raise AssertionError("a network is looked for")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An exported model; Llama's tokenizer begins each text with <s>."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer", begins=request.param == "llama")
    return export(tmp_path / "model", FAMILIES[request.param], tokenizer)


def write_tokenizer(folder: Path, begins: bool) -> Path:
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocab = {letter: i for i, letter in enumerate([*sorted(letters), "<s>", "</s>", "Ġt"])}
    fast = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[("Ġ", "t")]))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    fast.add_special_tokens(["<s>", "</s>"])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "clean_up_tokenization_spaces": False}
    config["chat_template"] = CHAT
    if begins:
        config["bos_token"] = "<s>"
        template = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
        fast.post_processor = template
    folder.mkdir()
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def export(folder: Path, model: ModelConfig, tokenizer: Path) -> Path:
    transformer = make(model)
    transformer.head_VH.data.mul_(3)
    tensors = {name: tensor.float() for name, tensor in tensors_of(transformer).items()}
    hf.write_hf_folder(folder, model, tensors.__getitem__, tokenizer_source=tokenizer)
    return folder


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def theirs(folder: Path, batch_size: int) -> HFLM:
    return HFLM(str(folder), device="cpu", dtype="float32", batch_size=batch_size)


def greedy_pairs(folder: Path) -> list[tuple[str, str]]:
    """Letters, and the text that greedy decoding adds to each, where it is text."""
    letters = [(letter, GREEDY | {"max_gen_toks": 1}) for letter in string.ascii_letters]
    added = theirs(folder, 1).generate_until(instances("generate_until", letters))
    return [(letter, text) for (letter, _), text in zip(letters, added, strict=True) if text.isascii() and text]


def answers(folder: str, kind: str, arguments: list[tuple[Any, ...]], tensor: int = 1, batch_size: int = 3) -> Any:
    """Of the first rank; None on those that serve."""
    mesh = make_inference_mesh(tensor)
    service = Service(load_shared_model(open_source(folder), mesh, batch_size), load_transformers_tokenizer(folder))
    with service:
        if not service.is_first:
            return service.serve()
        return getattr(lm_eval_model(service), kind)(instances(kind, arguments))


def in_all_layouts(folder: Path, kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    """One process; two tensor ranks; two data ranks; both."""
    several = [run_ranks(answers, world, str(folder), kind, arguments, tensor)[0] for world, tensor in LAYOUTS]
    return [answers(str(folder), kind, arguments), *several]


LAYOUTS = [(2, 2), (2, 1), (4, 2)]


def test_log_likelihoods_and_greedy_flags(folder: Path) -> None:
    pairs = [*PAIRS, *greedy_pairs(folder)]
    expected = theirs(folder, 2).loglikelihood(instances("loglikelihood", pairs))
    assert {greedy for _, greedy in expected} == {True, False}
    for found in in_all_layouts(folder, "loglikelihood", pairs):
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=TOLERANCE)


def test_rolling_log_likelihoods(folder: Path) -> None:
    texts = [(text,) for text in TEXTS]
    expected = theirs(folder, 2).loglikelihood_rolling(instances("loglikelihood_rolling", texts))
    for found in in_all_layouts(folder, "loglikelihood_rolling", texts):
        assert found == pytest.approx(expected, rel=TOLERANCE)


def test_generated_text(folder: Path) -> None:
    contexts = ["the quick", "a", LONG, "ünïcödé", "the quick", ""]
    model = theirs(folder, 1)
    free = model.generate_until(instances("generate_until", [(context, GREEDY) for context in contexts[:-1]]))
    stop = next(text[2:4] for text in free if len(text) > 4)
    asked = [(context, GREEDY) for context in contexts[:-1]]
    asked += [(context, GREEDY | {"until": [stop, free[1][3:4] or "x"]}) for context in contexts[:-1]]
    asked += [("a", {"until": stop, "max_gen_toks": 12}), ("b", {"until": [], "max_new_tokens": 3})]
    expected = model.generate_until(instances("generate_until", asked))
    assert any(stop in text for text in free) and not any(stop in text for text in expected[5:-1])
    for found in in_all_layouts(folder, "generate_until", asked):
        assert found == expected


def test_texts_of_a_batch_do_not_touch_each_other(folder: Path) -> None:
    pairs = [*PAIRS, *reversed(PAIRS)]
    one_by_one = answers(str(folder), "loglikelihood", pairs, batch_size=1)
    together = answers(str(folder), "loglikelihood", pairs, batch_size=64)
    assert [x for x, _ in together] == pytest.approx([x for x, _ in one_by_one], rel=TOLERANCE)


def write_tasks(folder: Path) -> Path:
    """Three tasks on local JSON files, one for each kind of request."""
    folder.mkdir()
    lines = [{"question": f"{n} and {n} are", "answers": ["two", "four", " ten"], "gold": n % 3} for n in range(5)]
    (folder / "data.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    head = f"dataset_path: json\ntest_split: test\ndataset_kwargs:\n  cache_dir: {folder}/cache\n"
    head += f"  data_files:\n    test: {folder}/data.json\n"
    tasks = {
        "choice": "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{answers}}'\n"
        "doc_to_target: gold\nmetric_list:\n  - metric: acc\n",
        "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{question}}'\nmetric_list:\n"
        "  - metric: bits_per_byte\n  - metric: word_perplexity\n",
        "written": "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: ' two'\n"
        "generation_kwargs:\n  until: ['\\n']\n  max_gen_toks: 4\nmetric_list:\n  - metric: exact_match\n",
    }
    for name, text in tasks.items():
        (folder / f"{name}.yaml").write_text(f"task: own_{name}\n{head}{text}")
    return folder


def run_tasks(folder: str, tasks: str, tensor: int, chat_template: bool = False) -> dict[str, Any] | None:
    shared = load_shared_model(open_source(folder), make_inference_mesh(tensor))
    names = ["own_choice", "own_rolling", "own_written"]
    settings = TaskSettings(names, include_path=tasks, num_fewshot=1, chat_template=chat_template)
    return evaluate_tasks(shared, load_transformers_tokenizer(folder), settings)


@pytest.mark.parametrize("chat_template", [False, True], ids=["plain", "chat"])
def test_tasks_on_local_files_without_a_network(folder: Path, tmp_path: Path, chat_template: bool) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    expected = lm_eval.simple_evaluate(
        theirs(folder, 2),
        tasks=["own_choice", "own_rolling", "own_written"],
        task_manager=TaskManager(include_path=str(tasks)),
        num_fewshot=1,
        apply_chat_template=chat_template,
        log_samples=False,
    )
    alone = run_tasks(str(folder), str(tasks), 1, chat_template)
    first, *others = run_ranks(run_tasks, 4, str(folder), str(tasks), 2, chat_template)
    assert others == [None] * 3
    for found in (alone, first):
        assert found["results"].keys() == expected["results"].keys()
        for name, metrics in expected["results"].items():
            for metric, value in metrics.items():
                expected_value = pytest.approx(value, rel=TOLERANCE) if isinstance(value, float) else value
                assert found["results"][name][metric] == expected_value


TOOL = Path(__file__).parents[2] / "tools" / "evaluate.py"


def run_tool(*arguments: object) -> int:
    """Runs the tool as the command line does; returns the exit code."""
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(SystemExit) as ended:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        monkeypatch.syspath_prepend(str(TOOL.parent))
        runpy.run_path(str(TOOL), run_name="__main__")
    return int(ended.value.code or 0)


def test_the_tool_writes_what_the_tasks_gave(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks, output = write_tasks(tmp_path / "tasks"), tmp_path / "result.json"
    given = [folder, "--include-path", tasks, "--limit", 4, "--output", output, "--tasks", "own_choice", "own_rolling"]
    assert run_tool(*given) == 0
    alone, shown = json.loads(output.read_text()), capsys.readouterr()
    assert "own_choice" in shown.out and "|acc" in shown.out and "loglikelihood_rolling step 4/4" in shown.err
    assert run_ranks(run_tool, 2, *given, "--tensor", 2) == [0, 0]
    together = json.loads(output.read_text())
    assert together["n-samples"]["own_choice"]["effective"] == 4 and together["settings"]["limit"] == 4
    for name, metrics in alone["results"].items():
        for metric, value in metrics.items():
            expected_value = pytest.approx(value, rel=TOLERANCE) if isinstance(value, float) else value
            assert together["results"][name][metric] == expected_value


def test_what_is_wrong_with_a_task_is_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    written = (tasks / "written.yaml").read_text()
    changes = {
        "missing": ("own_missing", written.replace("data.json", "absent.json"), 3, "absent.json"),
        "long": (
            "own_long",
            written.replace("max_gen_toks: 4", "max_gen_toks: 24"),
            2,
            "max_gen_toks=24 leaves no room",
        ),
        "beams": ("own_beams", written.replace("max_gen_toks: 4", "num_beams: 4"), 2, "num_beams is not done here"),
    }
    for name, (task, text, _, _) in changes.items():
        (tasks / f"{name}.yaml").write_text(text.replace("own_written", task))
    cases = [
        *((task, code, message) for task, _, code, message in changes.values()),
        ("own_none", 2, "no task own_none"),
    ]
    for task, code, message in cases:
        assert run_tool(folder, "--include-path", tasks, "--tasks", task) == code, task
        (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert message in error
