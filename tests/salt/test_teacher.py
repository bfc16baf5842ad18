"""The teacher inside the mesh: the same states as in one process, and gone when it is freed."""

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megagrow.config import ModelConfig, ParallelConfig, SaltConfig
from megagrow.errors import ConfigError, DataError
from megagrow.evaluate import make_batch
from megagrow.model.transformer import LossOptions, Transformer, initialize
from megagrow.parallel.mesh import Mesh, make_mesh
from megagrow.parallel.shards import chunk, full, shard_parameters
from megagrow.parallel.stages import own_stages
from megagrow.salt.schedule import teacher_weight
from megagrow.salt.teacher import Teacher, check_teacher, loss_options
from tests.ranks import run_ranks
from tests.salt.samples import SMALL, TIED, make_model, make_source, mesh_of

STUDENT = replace(SMALL, hidden_size=16, head_dim=4)
SALT = SaltConfig(teacher="small", steps=3, weight=0.4, temperature=0.5)
INHERITANCE = SaltConfig(
    teacher="small",
    steps=4,
    weight=1.0,
    schedule="linear",
    temperature=2.0,
    temperature_on="both",
    scale_by_temperature_squared=True,
)
BOTH = [pytest.param(SMALL, id="untied"), pytest.param(TIED, id="tied")]


def batch(size: int = 6, seq_length: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(SMALL.vocab_size, (size, seq_length), generator=generator)


def make_student(mesh: Mesh, model: ModelConfig = STUDENT) -> Transformer:
    """This rank's part of the student, in float64."""
    with torch.device("meta"):
        student = Transformer(model, mesh, stage=own_stages(model.num_layers, mesh)[-1])
    shard_parameters(student, model, mesh)
    student.double().to_empty(device="cpu")
    initialize(dict(student.named_parameters()), student.config, 1)
    return student


def make_teacher(mesh: Mesh, model: ModelConfig = SMALL, vocab_size: int = 29) -> Teacher:
    return Teacher(make_source(model), mesh, SALT, replace(STUDENT, vocab_size=vocab_size), torch.float64)


def hidden_here(model: ModelConfig, num_microbatches: int, tensor: int, pipeline: int) -> Any:
    """This rank's answer, whether it is the last stage, its data rank, and whether it holds an output matrix."""
    mesh = mesh_of(tensor, pipeline)
    teacher = make_teacher(mesh, model)
    rows = batch().chunk(mesh.dp.size)[mesh.dp.rank]
    first = teacher.hidden(rows, num_microbatches)
    teacher.attach(make_student(mesh) if mesh.pp.is_last else None)
    again = teacher.hidden(rows, num_microbatches)
    assert (first is None) == (again is None)
    if first is not None and again is not None:
        assert torch.equal(first, again)
    return first, mesh.pp.is_last, mesh.dp.rank, "head.weight" in dict(teacher.model.named_parameters())


def expected_hidden(model: ModelConfig) -> Tensor:
    return make_model(model)(batch())


@pytest.mark.parametrize("model", BOTH)
@pytest.mark.parametrize("num_microbatches", [1, 2, 6])
def test_one_process(model: ModelConfig, num_microbatches: int) -> None:
    hidden = make_teacher(Mesh.single(), model).hidden(batch(), num_microbatches)
    assert hidden is not None and not hidden.requires_grad
    torch.testing.assert_close(hidden, expected_hidden(model), rtol=0, atol=1e-13)


@pytest.mark.parametrize("model", BOTH)
@pytest.mark.parametrize(
    ("world", "pipeline", "tensor", "num_microbatches"),
    [(2, 2, 1, 2), (2, 2, 1, 3), (3, 3, 1, 6), (3, 3, 1, 2), (4, 2, 2, 3), (4, 2, 1, 3)],
)
def test_pipeline_ranks_share_the_microbatches(
    model: ModelConfig, world: int, pipeline: int, tensor: int, num_microbatches: int
) -> None:
    results = run_ranks(hidden_here, world, model, num_microbatches, tensor, pipeline)
    shares = expected_hidden(model).chunk(world // (pipeline * tensor))
    for hidden, is_last, dp_rank, has_head in results:
        assert (hidden is not None) == is_last
        assert has_head == (is_last and not model.tied_embeddings)
        if is_last:
            torch.testing.assert_close(hidden, shares[dp_rank], rtol=0, atol=1e-13)


def forwards_here(num_microbatches: int) -> int:
    mesh = mesh_of(pipeline=2)
    teacher = make_teacher(mesh)
    count = 0

    def add(*_: Any) -> None:
        nonlocal count
        count += 1

    teacher.model.register_forward_hook(add)
    teacher.hidden(batch(), num_microbatches)
    return count


def test_each_microbatch_is_run_once() -> None:
    assert run_ranks(forwards_here, 2, 6) == [3, 3]
    assert run_ranks(forwards_here, 2, 3) == [2, 1]


def test_the_dtype_is_that_asked_for() -> None:
    source = make_source(SMALL)
    by_default = Teacher(source, Mesh.single(), SALT, STUDENT).hidden(batch(), 2)
    assert by_default is not None and by_default.dtype == torch.float32
    small = Teacher(source, Mesh.single(), SALT, STUDENT, torch.bfloat16).hidden(batch(), 2)
    assert small is not None and small.dtype == torch.bfloat16


def mixed_loss(mesh: Mesh) -> tuple[float, list[Tensor], dict[str, Tensor]]:
    """Loss, its sums and the student's gradients with the attached teacher, on one pipeline
    stage.
    """
    student, teacher = make_student(mesh), make_teacher(mesh)
    teacher.attach(student)
    ids = batch()
    hidden = teacher.hidden(ids[:, :-1], 2)
    loss = student(ids[:, :-1], ids[:, 1:], torch.ones(6, 6).double(), hidden)
    loss.sum().backward()
    gradients = {name: full(p.grad) for name, p in student.named_parameters() if p.grad is not None}
    return loss.item(), student.loss_sums[0], gradients


def test_the_attached_teacher_reaches_the_loss() -> None:
    """The loss written densely from the logits of both models."""
    loss, sums, _ = mixed_loss(Mesh.single())
    ids = batch()
    student = make_student(Mesh.single())
    logits = student.logits(ids[:, :-1]).flatten(0, 1)
    target = (make_model(SMALL).logits(ids[:, :-1]) / SALT.temperature).softmax(-1).flatten(0, 1)
    ce = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").item()
    kd = F.kl_div(logits.log_softmax(-1), target, reduction="sum").item()
    assert loss == pytest.approx(0.6 * ce + 0.4 * kd, rel=1e-12)
    entropy = -(target * target.log()).sum().item()
    assert sums.tolist() == pytest.approx([loss, ce, kd, entropy], rel=1e-12)


def inherited_gradients(mesh: Mesh) -> list[dict[str, Tensor]]:
    """The student's gradients under knowledge inheritance at three steps of four, with one attached teacher."""
    student, ids = make_student(mesh), batch()
    teacher = Teacher(make_source(SMALL), mesh, INHERITANCE, STUDENT, torch.float64)
    teacher.attach(student)
    hidden, found = teacher.hidden(ids[:, :-1], 2), []
    for step in (0, 1, 3):
        teacher.weigh(student, teacher_weight(step, INHERITANCE))
        student.zero_grad()
        student(ids[:, :-1], ids[:, 1:], torch.ones(6, 6).double(), hidden).sum().backward()
        found.append({name: full(p.grad) for name, p in student.named_parameters() if p.grad is not None})
    return found


def inherited_here() -> Any:
    return inherited_gradients(mesh_of(tensor=2))


def test_knowledge_inheritance_against_a_plain_computation() -> None:
    """(1 - a) CE + a T^2 KL(teacher at T || student at T), differentiated by autograd."""
    ids, student = batch(), make_student(Mesh.single())
    logits = student.logits(ids[:, :-1]).flatten(0, 1)
    target = (make_model(SMALL).logits(ids[:, :-1]) / 2).softmax(-1).flatten(0, 1)
    ce = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")
    kl = F.kl_div((logits / 2).log_softmax(-1), target, reduction="sum")
    whole, on_ranks = inherited_gradients(Mesh.single()), run_ranks(inherited_here, 2)
    for i, a in enumerate((1.0, 0.75, 0.25)):
        loss, parameters = (1 - a) * ce + a * 4 * kl, dict(student.named_parameters())
        expected = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
        for found in (whole[i], *(ranks[i] for ranks in on_ranks)):
            assert found.keys() == parameters.keys()
            for name, gradient in zip(parameters, expected, strict=True):
                torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-11, msg=name)


def mixed_loss_here() -> Any:
    return mixed_loss(mesh_of(tensor=2))


def test_tensor_parallel_teachers_give_the_same_gradients() -> None:
    """A vocabulary of 29 on two ranks; the gradients of every parameter of the student."""
    loss, sums, gradients = mixed_loss(Mesh.single())
    for other_loss, other_sums, other_gradients in run_ranks(mixed_loss_here, 2):
        assert other_loss == pytest.approx(loss, rel=1e-12)
        torch.testing.assert_close(other_sums, sums, rtol=1e-12, atol=0)
        assert set(other_gradients) == set(gradients)
        for name, gradient in gradients.items():
            torch.testing.assert_close(other_gradients[name], gradient, rtol=0, atol=1e-11, msg=name)


def test_the_head_is_this_ranks_share() -> None:
    for rank, shape in enumerate(run_ranks(head_shape_here, 2)):
        assert shape == (15 if rank == 0 else 14, SMALL.hidden_size)


def head_shape_here() -> tuple[int, ...]:
    mesh = mesh_of(tensor=2)
    student = make_student(mesh)
    make_teacher(mesh).attach(student)
    assert student.teacher is not None
    vocab = chunk(SMALL.vocab_size, mesh.tp)
    assert torch.equal(student.teacher.head_VH, make_model(SMALL).head_VH[vocab])
    return tuple(student.teacher.head_VH.shape)


def live_bytes() -> int:
    """Bytes of all tensors that anything still refers to."""
    gc.collect()
    storages = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for x in gc.get_objects()
        if type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu"
    }
    return sum(storages.values())


@pytest.mark.parametrize("model", BOTH)
def test_freeing_releases_every_buffer(model: ModelConfig) -> None:
    student = make_student(Mesh.single())
    before = live_bytes()
    teacher = make_teacher(Mesh.single(), model)
    teacher.attach(student)
    weights = [weakref.ref(p) for p in teacher.model.parameters()]
    size = sum(p.numel() * p.element_size() for p in teacher.model.parameters())
    assert live_bytes() - before >= size
    gc.disable()  # nothing may wait for the collector
    try:
        teacher.free(student)
        assert [reference() for reference in weights] == [None] * len(weights)
    finally:
        gc.enable()
    assert live_bytes() == before
    assert student.teacher is None
    with pytest.raises(AssertionError, match="freed"):
        teacher.hidden(batch(), 2)


def evaluated_here(**layout: int) -> list[float]:
    mesh = make_mesh(ParallelConfig(**layout)) if torch.distributed.is_initialized() else Mesh.single()
    tokens = batch(36, 9).chunk(mesh.dp.size)[mesh.dp.rank]
    return make_teacher(mesh).evaluate(make_batch(tokens, 36, mesh)).tolist()


def test_its_held_out_loss_is_the_mean_over_all_tokens() -> None:
    """Several pieces for every pipeline rank, on every rank the same."""
    tokens = batch(36, 9)
    logits = make_model(SMALL).logits(tokens[:, :-1]).flatten(0, 1)
    loss = F.cross_entropy(logits, tokens[:, 1:].flatten()).item()
    expected = pytest.approx([loss, loss, 0.0, 0.0], rel=1e-6)  # weights are float32
    assert evaluated_here() == expected
    for world, layout in ((2, {"pipeline": 2}), (4, {"pipeline": 2}), (2, {"tensor": 2}), (2, {"context": 2})):
        assert run_ranks(evaluated_here, world, **layout) == [expected] * world, layout


def test_after_freeing_the_loss_is_plain() -> None:
    student, ids = make_student(Mesh.single()), batch()
    plain = student(ids[:, :-1], ids[:, 1:])
    teacher = make_teacher(Mesh.single())
    teacher.attach(student)
    hidden = teacher.hidden(ids[:, :-1], 2)
    assert not torch.equal(student(ids[:, :-1], ids[:, 1:], teacher_hidden=hidden), plain)
    teacher.free(student)
    assert torch.equal(student(ids[:, :-1], ids[:, 1:]), plain)


def test_vocabularies_that_differ_by_more_than_padding_are_refused() -> None:
    message = "the teacher has vocab_size=29, the model vocab_size=33: .* 4 rows .*at most 3.*; use a teacher with"
    with pytest.raises(ConfigError, match=message):
        Teacher(make_source(SMALL), Mesh.single(), SALT, replace(STUDENT, vocab_size=33))
    with pytest.raises(ConfigError, match=message):
        check_teacher(SMALL, replace(STUDENT, vocab_size=33), 8)
    with pytest.raises(ConfigError, match="31 rows are too many for padding .at most 28"):
        check_teacher(replace(SMALL, vocab_size=229), replace(STUDENT, vocab_size=260), 8)
    with pytest.raises(ConfigError, match="1072 rows are too many for padding .at most 1024"):
        check_teacher(replace(SMALL, vocab_size=151_936), replace(STUDENT, vocab_size=153_008), 8)
    qwen = [replace(STUDENT, vocab_size=size) for size in (151_936, 152_064)]  # Qwen2.5's small and large models
    check_teacher(qwen[0], qwen[1], 8)
    check_teacher(qwen[1], qwen[0], 8)


def padded_loss(mesh: Mesh, model: ModelConfig, vocab_size: int) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a student whose vocabulary has another size than the teacher's."""
    student, teacher = (
        make_student(mesh, replace(STUDENT, vocab_size=vocab_size)),
        make_teacher(mesh, model, vocab_size),
    )
    teacher.attach(student)
    ids = batch() % 27
    loss = student(ids[:, :-1], ids[:, 1:], torch.ones(6, 6).double(), teacher.hidden(ids[:, :-1], 2))
    loss.sum().backward()
    return loss.item(), {name: full(p.grad) for name, p in student.named_parameters() if p.grad is not None}


def padded_loss_here(model: ModelConfig, vocab_size: int) -> Any:
    return padded_loss(mesh_of(tensor=2), model, vocab_size)


@pytest.mark.parametrize("vocab_size", [27, 32])
@pytest.mark.parametrize("model", BOTH)
def test_a_teacher_with_another_padding(model: ModelConfig, vocab_size: int) -> None:
    """Against both models' logits, cut down to the tokens that both know; on two ranks their shards end elsewhere."""
    ids, student = batch() % 27, make_student(Mesh.single(), replace(STUDENT, vocab_size=vocab_size))
    logits = student.logits(ids[:, :-1]).flatten(0, 1)
    common = min(vocab_size, 29)
    target = (make_model(model).logits(ids[:, :-1]).flatten(0, 1)[:, :common] / SALT.temperature).softmax(-1)
    ce = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")
    kd = F.kl_div(logits[:, :common].log_softmax(-1), target, reduction="sum")
    parameters = dict(student.named_parameters())
    expected = torch.autograd.grad(0.6 * ce + 0.4 * kd, list(parameters.values()))
    for loss, gradients in (
        padded_loss(Mesh.single(), model, vocab_size),
        *run_ranks(padded_loss_here, 2, model, vocab_size),
    ):
        assert loss == pytest.approx((0.6 * ce + 0.4 * kd).item(), rel=1e-12)
        for name, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-11, msg=name)


def test_tokens_that_only_the_model_knows_are_no_padding() -> None:
    teacher = make_teacher(Mesh.single(), SMALL, 32)
    with pytest.raises(DataError, match="holds token 30, the teacher small has vocab_size=29 and the model 32: .*must"):
        teacher.hidden(torch.full((2, 4), 30), 1)


def test_the_position_table_must_reach() -> None:
    check_teacher(TIED, STUDENT, 16)
    check_teacher(SMALL, STUDENT, 1000)
    with pytest.raises(ConfigError, match="seq_length=17 exceeds the teacher's max_seq_length=16"):
        check_teacher(TIED, STUDENT, 17)


def test_the_tensor_axis_must_divide_the_teacher() -> None:
    with pytest.raises(ConfigError, match="tensor=4 does not divide ffn_size=10 of the teacher"):
        run_ranks(hidden_here, 4, SMALL, 2, 4, 1)


@pytest.mark.parametrize(
    ("salt", "options"),
    [
        (SaltConfig(weight=0.3, temperature=2.0), LossOptions(0.3, 2.0, False, 1.0)),
        (SaltConfig(temperature=2.0, temperature_on="both"), LossOptions(0.5, 2.0, True, 1.0)),
        (
            SaltConfig(temperature=0.25, scale_by_temperature_squared=True),
            LossOptions(0.5, 0.25, False, 0.0625),
        ),
        (SaltConfig(divergence="reverse_kl"), LossOptions(0.5, divergence="reverse_kl")),
    ],
)
def test_loss_options(salt: SaltConfig, options: LossOptions) -> None:
    assert loss_options(salt) == options
