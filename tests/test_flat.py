"""FlatValues: one parameter for all layers, which trains as many do."""

import copy
import pickle

import pytest
import torch
from flat_models import Model, sparse_model, values
from safetensors.torch import load_model, save_model
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from speft_kernels import FlatValues, SpeftConfig, apply_patterns
from speft_kernels.errors import ConfigError, StaleWeightError
from speft_kernels.testing import uniform_pattern


@pytest.mark.parametrize("mode", ["resident", "additive"])
@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_it_trains_as_separate_values_do(mode, to_none, fused):
    apart, together = sparse_model(mode), sparse_model(mode)
    flat = FlatValues(together)
    settings = {"lr": 1e-2, "weight_decay": 0.0, "fused": fused}
    optimizers = [
        torch.optim.AdamW([*values(apart), *apart.head.parameters()], **settings),
        torch.optim.AdamW([flat.parameter, *together.head.parameters()], **settings),
    ]
    for _ in range(5):
        micro = [torch.randn(3, 7, 48) for _ in range(2)]
        losses = []
        for model, optimizer in zip((apart, together), optimizers, strict=True):
            total = 0.0
            for x in micro:
                loss = model(x).square().mean()
                loss.backward()
                total += loss.item()
            losses.append(total)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
        # The same sums; clipping adds the squares of one tensor or of four, in float32.
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for one, other in zip(values(apart), values(together), strict=True):
        # Five steps of 1e-2, by gradients that differ in the last bits.
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_an_optimizer_of_the_layers_values_trains_beside_it(fused):
    """As trainers make one of `model.parameters()`; a fused one writes past the values' version."""
    curves = []
    for flat in (False, True):
        model = sparse_model()
        if flat:
            FlatValues(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0, fused=fused)
        torch.manual_seed(2)
        x, losses = torch.randn(16, 48), []
        for _ in range(4):
            loss = (model(x) - 1).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        model(x)
        assert torch.equal(model.q.weight, model.q.effective_weight())
        curves.append(losses)
    assert curves[0] == curves[1]
    assert curves[0][-1] < curves[0][0]


def test_gradients_of_micro_batches_are_added_in_place():
    model = sparse_model()
    flat = FlatValues(model)
    x = torch.randn(5, 48)
    model(x).sum().backward()
    once, buffer = flat.parameter.grad.clone(), flat.parameter.grad.data_ptr()
    parts = [v.grad.data_ptr() for v in values(model)]
    model(x).sum().backward()
    assert flat.parameter.grad.data_ptr() == buffer
    assert [v.grad.data_ptr() for v in values(model)] == parts
    assert parts[0] == buffer
    # Twice the same sums: one rounding of the doubled result.
    torch.testing.assert_close(flat.parameter.grad, 2 * once, rtol=1e-6, atol=0)
    flat.parameter.grad = None
    model(x).sum().backward()
    assert torch.equal(flat.parameter.grad, once)
    model.q.values.grad = None  # one layer's alone
    model(x).sum().backward()
    count = model.q.values.numel()
    assert torch.equal(flat.parameter.grad[:count], once[:count])


def test_a_layer_that_takes_no_part_has_a_zero_gradient():
    model = sparse_model()
    flat = FlatValues(model)
    model(torch.randn(5, 48)).sum().backward()
    flat.parameter.grad = None
    model.q(torch.randn(5, 48)).sum().backward()
    count = model.q.values.numel()
    assert flat.parameter.grad[:count].abs().sum() > 0
    assert flat.parameter.grad[count:].abs().sum() == 0
    assert model.k.values.grad is None


def test_the_stale_weight_is_seen_through_the_one_parameter():
    model = sparse_model()
    flat = FlatValues(model)
    optimizer = torch.optim.SGD([flat.parameter], lr=0.1)
    loss = model(torch.randn(5, 48)).sum()
    flat.parameter.grad = torch.ones_like(flat.parameter)
    optimizer.step()
    with pytest.raises(StaleWeightError):
        loss.backward()
    x = torch.randn(5, 48)
    before = model.q.base_weight()
    model(x)
    assert not torch.equal(model.q.weight, before)


def test_state_dicts_copies_and_release():
    model = sparse_model()
    flat = FlatValues(model)
    with torch.no_grad():
        flat.parameter.normal_()
    for layer in (model.q, model.o):
        layer.sync()
    x = torch.randn(5, 48)
    expected = model(x)
    fresh = sparse_model(seed=2)
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(x), expected)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x), expected)
    twin(x).sum().backward()  # a copy is not flat: autograd has its gradients
    assert twin.q.values.grad is not None
    assert flat.parameter.grad is None
    flat.release()
    with torch.no_grad():
        flat.parameter.zero_()
    assert torch.equal(model(x), expected)
    FlatValues(model)


def test_bad_models_are_refused():
    with pytest.raises(ConfigError, match="no sparse layer"):
        FlatValues(Model())
    model = sparse_model()
    FlatValues(model)
    with pytest.raises(ConfigError, match="flat already"):
        FlatValues(model)
    mixed = sparse_model()
    mixed.q.double()
    with pytest.raises(ConfigError, match="several kinds"):
        FlatValues(mixed)


def test_a_cast_of_the_weights_leaves_the_values_where_they_are():
    model = sparse_model()
    flat = FlatValues(model)
    model.bfloat16()
    model(torch.randn(5, 48).bfloat16()).sum().backward()
    assert model.q.values.dtype == torch.float32
    assert model.q.values.grad.data_ptr() == flat.parameter.grad.data_ptr()


def test_values_that_were_moved_are_refused_at_the_first_backward():
    model = sparse_model()
    flat = FlatValues(model)
    model.double()  # their dtype follows
    x = torch.randn(5, 48).double()
    with pytest.raises(ConfigError, match="left the one buffer"):
        model(x).sum().backward()
    flat.release()
    model(x).sum().backward()
    assert model.q.values.grad is not None


def train_in_process(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    trained = {}
    for kind in ("apart", "flat"):
        model = sparse_model()
        own = [FlatValues(model).parameter] if kind == "flat" else values(model)
        parallel = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW([*own, *model.head.parameters()], lr=1e-2, weight_decay=0)
        generator = torch.Generator().manual_seed(rank)  # other data on each rank
        for _ in range(3):
            with parallel.no_sync():
                parallel(torch.randn(4, 48, generator=generator)).square().mean().backward()
            parallel(torch.randn(4, 48, generator=generator)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        trained[kind] = torch.cat([v.detach().flatten() for v in values(model)])
    torch.save(trained, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")
def test_data_parallel_processes_train_as_with_separate_values(tmp_path):
    multiprocessing.spawn(train_in_process, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert torch.equal(ranks[0]["flat"], ranks[1]["flat"])
    assert torch.equal(ranks[0]["flat"], ranks[0]["apart"])
    assert ranks[0]["flat"].abs().max() > 1e-2  # three steps of 1e-2: it trained


def count_buckets(rank, folder):
    """How many buckets DDP reduces in a step, for 0.5 MB of values and for 1.5 MB."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    sizes, counts = [], []

    def reduce(state, bucket):
        sizes.append(bucket.buffer().numel())
        done = distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
        return done.then(lambda future: future.value()[0])

    for layers, settings in ((2, {}), (6, {}), (6, {"bucket_cap_mb": 2})):
        model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(layers)))
        some = {str(i): uniform_pattern((512, 512), 0.25, seed=i) for i in range(layers)}
        apply_patterns(model, some, SpeftConfig(density=0.25))
        flat = FlatValues(model)
        parallel = DistributedDataParallel(model, **settings)
        parallel.register_comm_hook(None, reduce)
        for _ in range(2):  # DDP makes its buckets again after the first
            flat.parameter.grad = None
            sizes.clear()
            parallel(torch.ones(4, 512)).square().mean().backward()
        assert sum(sizes) == flat.parameter.numel() == layers * 512 * 512 // 4
        counts.append(len(sizes))
    torch.save(counts, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")
def test_data_parallel_processes_reduce_one_bucket_where_it_holds_all_values(tmp_path):
    multiprocessing.spawn(count_buckets, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        # By default the first closes at 1 MB, four layers, and the rest go into another.
        assert torch.load(tmp_path / f"{rank}.pt") == [1, 2, 1]


def test_a_layer_that_gave_its_weight_away_is_written_no_more():
    model = sparse_model()
    given = model.q  # kept alive
    model.q = given.to_linear()
    with torch.no_grad():
        model.q.weight.fill_(3.0)
        model.k.values.add_(1.0)  # the family's next write
    model(torch.randn(5, 48))
    assert bool((model.q.weight == 3.0).all())
    assert given.pattern.nnz > 0


@pytest.mark.parametrize("mode", ["resident", "additive"])
def test_what_is_written_to_the_parameter_is_what_the_layers_compute(mode):
    model = sparse_model(mode)
    flat = FlatValues(model)
    x = torch.randn(5, 48)
    loss = model(x).sum()
    with torch.no_grad():
        flat.parameter.normal_(std=0.1)
    with pytest.raises(StaleWeightError):
        loss.backward()
    found = model(x)
    flat.release()
    for layer in (model.q, model.k, model.v, model.o):
        layer.sync()
    assert torch.equal(model(x), found)


def test_an_optimizer_that_evaluates_within_its_step_trains_as_with_separate_values():
    curves = []
    for flat in (False, True):
        model = sparse_model()
        trained = [FlatValues(model).parameter] if flat else values(model)
        optimizer = torch.optim.LBFGS(trained, lr=0.5, max_iter=5)
        torch.manual_seed(2)
        x, losses = torch.randn(16, 48), []

        def closure(model=model, optimizer=optimizer, x=x, losses=losses):
            optimizer.zero_grad()
            loss = (model(x) - 1).square().mean()
            loss.backward()
            losses.append(loss.item())
            return loss

        for _ in range(2):
            optimizer.step(closure)
        curves.append(losses)
    assert curves[0][-1] < 0.9 * curves[0][0]
    # The sums over one tensor or over four, in float32, decide the same steps.
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)


def test_gradients_that_the_model_drops_are_not_stepped_again():
    """`model.zero_grad()`, as a trainer calls it, and layers that a step does not reach."""
    trained = []
    for flat in (False, True):
        model = sparse_model()
        parameters = [FlatValues(model).parameter] if flat else values(model)
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        torch.manual_seed(2)
        for layer in (model.q, model.k, model.k, model.q):
            layer(torch.randn(5, 48)).sum().backward()
            if layer is model.k:
                layer.values.grad = layer.values.grad * 0.5  # replaced, not changed
            optimizer.step()
            model.zero_grad()
        trained.append([v.detach().clone() for v in values(model)])
    for one, other in zip(*trained, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert trained[0][0].abs().sum() > 0


def test_values_that_are_not_the_layers_own_are_refused():
    model = sparse_model()
    FlatValues(model)
    model.load_state_dict(model.state_dict(), assign=True)
    with pytest.raises(ConfigError, match="given other values"):
        model(torch.randn(5, 48)).sum().backward()


def test_values_that_do_not_train_are_left_out():
    model = sparse_model()
    with torch.no_grad():
        for v in values(model):
            v.fill_(1.0)
    model.k.values.requires_grad_(False)
    flat = FlatValues(model)
    optimizer = torch.optim.AdamW([flat.parameter], lr=0.1, weight_decay=0.5)
    for _ in range(2):
        model(torch.randn(5, 48)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert bool((model.k.values == 1.0).all())
    assert not bool((model.q.values == 1.0).any())
    for v in values(model):
        v.requires_grad_(False)
    flat.release()
    with pytest.raises(ConfigError, match="no sparse layer with values to train"):
        FlatValues(model)


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, pickle.dumps])
def test_it_is_not_copied_without_its_layers(copier):
    model = sparse_model()
    flat = FlatValues(model)
    with pytest.raises(ConfigError, match="copy the model, and build FlatValues of that"):
        copier(flat)
    copier(model)


@pytest.mark.parametrize("how", ["register_hook", "register_post_accumulate_grad_hook"])
def test_values_with_hooks_are_refused(how):
    model = sparse_model()
    hook = getattr(model.k.values, how)(lambda _: None)
    with pytest.raises(ConfigError, match="have hooks, which would see no gradient"):
        FlatValues(model)
    assert model.q.values.grad is None
    hook.remove()
    FlatValues(model)


def test_safetensors_keep_the_values_of_every_layer(tmp_path):
    model, fresh = sparse_model(), sparse_model(seed=2)
    flat = FlatValues(model)
    with torch.no_grad():
        flat.parameter.normal_(std=0.1)
    save_model(model, tmp_path / "model.safetensors")
    FlatValues(fresh)
    assert load_model(fresh, tmp_path / "model.safetensors") == (set(), [])
    x = torch.randn(5, 48)
    assert torch.equal(fresh(x), model(x))
