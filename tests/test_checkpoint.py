"""`checkpoint` of what is no stack: values, gradients, residuals, and what Flax modules do with their variables."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxckpt import checkpoint, checkpoint_scan
from jaxckpt.analysis import jaxpr as jx
from tests.support import assert_no_zero_leaf, pull_back, random_like, relative_error

TOKENS, WIDTH, WORDS = 24, 8, 400
with jax.enable_x64(True):
    X = random_like(jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.float64), 1)
    KERNEL = random_like(jax.ShapeDtypeStruct((WIDTH, WORDS), jnp.float64), 2)
    LABELS = (jnp.arange(TOKENS) * 7) % WORDS
SETTINGS = [{}, {"policy": "dots"}, {"policy": "cheap"}, {"stages": 3}, {"tiles": 4}, {"tiles": 5, "policy": "save:hidden"}]


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def loss_of(kernel, x, labels, *, mask=None, smoothing="none"):
    assert smoothing == "none"
    logits = checkpoint_name(jnp.tanh(x), "hidden") @ kernel
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean() if mask is None else jnp.where(mask, losses, 0).sum() / mask.sum()


@pytest.mark.parametrize("knobs", SETTINGS, ids=str)
@pytest.mark.parametrize("with_mask", [False, True])
def test_a_head_with_its_loss(knobs, with_mask):
    mask = (jnp.arange(TOKENS) % 3 > 0) if with_mask else None

    def gradients(fn):
        run = functools.partial(fn, labels=LABELS, mask=mask, smoothing="none")
        return jax.jit(jax.value_and_grad(run, argnums=(0, 1)))(KERNEL, X)

    got, want = gradients(checkpoint(loss_of, **knobs)), gradients(loss_of)
    assert_no_zero_leaf(got)
    assert relative_error(got, want) < 1e-12


def largest(jaxpr):
    """The most entries of any value of a program."""
    return max(var.aval.size for eqn in jx.equations(jaxpr) for var in eqn.outvars)


def test_logits_of_a_head_in_slices_never_exist_whole():
    step = lambda fn: jax.make_jaxpr(jax.grad(fn, argnums=(0, 1)))(KERNEL, X, LABELS).jaxpr  # noqa: E731
    assert largest(step(loss_of)) == TOKENS * WORDS
    assert largest(step(checkpoint(loss_of, tiles=4))) == max(TOKENS // 4 * WORDS, WIDTH * WORDS)


def products(jaxpr):
    """How many matrix products a program runs, those of loops as often as they go round."""
    inner = [products(part) * eqn.params.get("length", 1) for eqn in jaxpr.eqns for part in jx.inner_jaxprs(eqn)]
    return sum(inner) + sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns)


def test_a_head_in_slices_is_run_twice():
    """The product itself, the same again, and its two derivatives, in each of four slices: losses of tokens are kept."""
    step = jax.grad(checkpoint(loss_of, tiles=4), argnums=(0, 1))
    assert products(jax.make_jaxpr(step)(KERNEL, X, LABELS).jaxpr) == 4 * 4


@pytest.mark.parametrize("name", ["nothing", "dots", "dots_no_batch", "everything", "save:hidden"])
def test_without_pieces_it_is_the_program_of_jax(name):
    saveable = jax.checkpoint_policies
    policy = {
        "nothing": saveable.nothing_saveable,
        "dots": saveable.dots_saveable,
        "dots_no_batch": saveable.dots_with_no_batch_dims_saveable,
        "everything": saveable.everything_saveable,
        "save:hidden": saveable.save_only_these_names("hidden"),
    }[name]

    def program(fn):
        return str(jax.make_jaxpr(jax.jit(jax.value_and_grad(fn, argnums=(0, 1))))(KERNEL, X, LABELS))

    def primitives(text):
        return sorted(word for line in text.splitlines() for word in line.split() if word.isidentifier() and len(word) > 3)

    ours, theirs = program(checkpoint(loss_of, policy=name)), program(jax.checkpoint(loss_of, policy=policy))
    assert primitives(ours) == primitives(theirs)
    assert residuals(checkpoint(loss_of, policy=name)) == residuals(jax.checkpoint(loss_of, policy=policy))


def residuals(fn):
    """What the backward pass is given."""
    pull = jax.eval_shape(lambda *args: jax.vjp(lambda *args: fn(*args, LABELS), *args)[1], KERNEL, X)
    return sorted((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(pull))


class Head(nn.Module):
    words: int = WORDS

    @nn.compact
    def __call__(self, x, labels, train=False):
        x = nn.Dropout(0.5, deterministic=not train)(nn.Dense(WIDTH, param_dtype=x.dtype)(x))
        seen = self.variable("statistics", "seen", jnp.zeros, (), x.dtype)
        if not self.is_initializing():
            seen.value += x.sum()
        self.sow("intermediates", "hidden", x)
        logits = nn.Dense(self.words, param_dtype=x.dtype, name="logits")(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class Decorated(nn.Module):
    words: int = WORDS

    @functools.partial(checkpoint, tiles=4)
    @nn.compact
    def __call__(self, x, labels, train=False):
        return Head.__call__.__wrapped__(self, x, labels, train)


class Inside(nn.Module):
    """A bound module, and its method."""

    by_method: bool = False

    @nn.compact
    def __call__(self, x, labels, train=False):
        head = Head(name="head")
        return checkpoint(head.__call__ if self.by_method else head, tiles=4)(x, labels, train=train)


def linen_value(module, variables, train):
    def loss(params, x):
        rngs = {"dropout": jax.random.key(3)} if train else {}
        given = {**variables, "params": params}
        return module.apply(given, x, LABELS, train=train, rngs=rngs, mutable=["statistics", "intermediates"])

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(variables["params"], X)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("knobs", [{}, {"policy": "dots"}, {"tiles": 4}], ids=str)
def test_linen_is_as_nn_remat_makes_it(knobs, train):
    """Variables by name and value, random numbers, what is written and sown: bit for bit where the arithmetic is."""
    plain = Head()
    variables = plain.init(jax.random.key(0), X, LABELS)
    want = linen_value(plain, variables, train)
    for module in (checkpoint(Head, **knobs)(), checkpoint(Head(), **knobs)):
        assert jax.tree.all(jax.tree.map(jnp.array_equal, module.init(jax.random.key(0), X, LABELS), variables))
        assert relative_error(linen_value(module, variables, train), want) < 1e-12
    assert checkpoint(Head, **knobs) is checkpoint(Head, **knobs)
    assert checkpoint(Head, **knobs).__name__ == nn.remat(Head).__name__


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("by_method", [False, True])
def test_a_bound_module_and_its_method(by_method, train):
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x, labels, train=False):
            return Head(name="head")(x, labels, train=train)

    variables = Plain().init(jax.random.key(0), X, LABELS)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, Inside(by_method).init(jax.random.key(0), X, LABELS), variables))
    want = linen_value(Plain(), variables, train)
    assert relative_error(linen_value(Inside(by_method), variables, train), want) < 1e-12


class Given(nn.Module):
    """A bound module among the arguments."""

    where: str = "second"

    @nn.compact
    def __call__(self, x, labels, train=False):
        head = Head(name="head")
        if self.where == "second":
            return checkpoint(lambda x, m: m(x, labels, train), tiles=4)(x, head)
        if self.where == "keyword":
            return checkpoint(lambda x, m: m(x, labels, train), tiles=4)(x, m=head)
        return checkpoint(lambda x, m: m["heads"][0](x, labels, train))(x, {"heads": [head]})


@pytest.mark.parametrize("where", ["second", "keyword", "in a tree"])
def test_a_bound_module_among_the_arguments(where):
    module = Given(where)
    variables = {"params": {}, "statistics": {}}
    plain = Head().init(jax.random.key(0), X, LABELS)
    variables = {name: {"head": tree} for name, tree in plain.items()}
    made = module.init(jax.random.key(0), X, LABELS)
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, variables)
    value, (of_params, of_x) = linen_value(module, variables, True)
    assert jax.tree.all(jax.tree.map(lambda leaf: bool(jnp.isfinite(leaf).all()), (value, of_params, of_x)))
    assert float(value[1]["statistics"]["head"]["seen"]) != 0


class Closure(nn.Module):
    writes: bool = False

    @nn.compact
    def __call__(self, x):
        layer = nn.BatchNorm(use_running_average=not self.writes, param_dtype=x.dtype, name="layer")
        return checkpoint(lambda x: jnp.exp(jnp.sin(layer(x))))(x)


def test_a_bound_module_that_is_closed_over():
    variables = Closure().init(jax.random.key(0), X)
    assert not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(variables))
    loss = lambda params, fn: fn({**variables, "params": params}, X).sum()  # noqa: E731
    got = jax.grad(loss)(variables["params"], Closure().apply)
    assert got["layer"]["scale"].shape == (WIDTH,) and bool(jnp.any(got["layer"]["scale"] != 0))
    with pytest.raises(ValueError, match=r"<lambda> writes .*mean.* of a Linen module that it closes over"):
        Closure(writes=True).apply(variables, X, mutable=["batch_stats"])


def test_a_method_that_is_decorated():
    want = linen_value(Head(), variables := Head().init(jax.random.key(0), X, LABELS), True)
    assert relative_error(linen_value(Decorated(), variables, True), want) < 1e-12


class NnxHead(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(WIDTH, WORDS, rngs=rngs, param_dtype=jnp.float64)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.seen = nnx.BatchStat(jnp.zeros(()))
        self.calls = 0

    def __call__(self, x, labels):
        self.calls += 1
        x = self.dropout(x)
        self.seen.set_value(self.seen.get_value() + x.sum())
        return optax.softmax_cross_entropy_with_integer_labels(self.dense(x), labels).mean()


@pytest.mark.parametrize("knobs", [{}, {"policy": "dots"}, {"tiles": 4}], ids=str)
@pytest.mark.parametrize("kind", ["module", "class", "function", "method", "argument"])
def test_nnx_writes_back_what_it_changes(kind, knobs):
    plain, made = NnxHead(nnx.Rngs(0)), NnxHead(nnx.Rngs(0))
    run = {
        "module": lambda: checkpoint(made, **knobs),
        "class": lambda: checkpoint(NnxHead, **knobs)(nnx.Rngs(0)),
        "function": lambda: functools.partial(checkpoint(lambda m, x, y: m(x, y), **knobs), made),
        "method": lambda: checkpoint(made.__call__, **knobs),
        "argument": lambda: checkpoint(functools.partial(NnxHead.__call__, made), **knobs),
    }[kind]()
    module = run if kind in ("module", "class") else made
    for _ in range(2):  # counters of random numbers go on
        got = nnx.value_and_grad(lambda m, x: run(x, LABELS) if m is made else m(x, LABELS))(module, X)
        want = nnx.value_and_grad(lambda m, x: m(x, LABELS))(plain, X)
        if kind in ("module", "class"):
            assert relative_error(jax.tree.leaves(got), jax.tree.leaves(want)) < 1e-12
        else:
            assert abs(got[0] - want[0]) < 1e-12 * abs(want[0])
    assert float(plain.seen.get_value()) == pytest.approx(float(module.seen.get_value()), rel=1e-12) != 0
    assert plain.dropout.rngs.count.get_value() == module.dropout.rngs.count.get_value() == 2
    assert plain.calls == module.calls == 2


def test_an_nnx_module_shares_the_variables_of_the_one_it_is_made_of():
    module = NnxHead(nnx.Rngs(0))
    checkpointed = checkpoint(module)
    assert isinstance(checkpointed, NnxHead) and checkpointed.dense is module.dense
    assert jax.tree.structure(nnx.state(checkpointed)) == jax.tree.structure(nnx.state(module))


def test_a_stack_inside():
    w = random_like(jax.ShapeDtypeStruct((4, WIDTH), jnp.float64), 5)

    def model(w, kernel, x):
        return loss_of(kernel, checkpoint_scan(lambda w, x: jnp.sin(w[None] * x))(w, x), LABELS)

    got, want = (pull_back(fn, w, KERNEL, X) for fn in (checkpoint(model, tiles=3), model))
    assert relative_error(got, want) < 1e-12


def test_transformations():
    fn = checkpoint(loss_of, tiles=4)
    xs = jnp.stack([X, X + 1])
    batched = jax.jit(jax.vmap(jax.grad(fn, argnums=1), in_axes=(None, 0, None)))(KERNEL, xs, LABELS)
    each = jnp.stack([jax.grad(loss_of, argnums=1)(KERNEL, x, LABELS) for x in xs])
    assert relative_error(batched, each) < 1e-12
    forward = [jax.jvp(lambda x, f=f: f(KERNEL, x, LABELS), (X,), (X,)) for f in (fn, loss_of)]
    assert relative_error(*forward) < 1e-12


class NoCall(nnx.Module):
    pass


def test_bad_input():
    with pytest.raises(TypeError, match="checkpoint takes a function, a Flax module or a class of them; got 3"):
        checkpoint(3)
    with pytest.raises(ValueError, match="tiles, the slices"):
        checkpoint(loss_of, tiles=0)
    with pytest.raises(ValueError, match="dotz"):
        checkpoint(loss_of, policy="dotz")
    with pytest.raises(ValueError, match="loss_of: stages: nothing in the block is tagged 'logits'"):
        checkpoint(loss_of, stages="tags:logits")(KERNEL, X, LABELS)
    with pytest.raises(ValueError, match=r"loss_of: .*'logits'"):
        checkpoint(loss_of, policy="save:logits")(KERNEL, X, LABELS)
    with pytest.raises(TypeError, match=r"an argument is a jax\.Ref, .* write into the Ref what is returned"):
        checkpoint(lambda x: x[...])(jax.new_ref(X))
    with pytest.raises(TypeError, match=r"NoCall has no method __call__: write checkpoint\(module\.method\)"):
        checkpoint(NoCall)
    with pytest.raises(
        ValueError, match=r"<lambda> has a side effect, .* it would happen twice\. Return the value instead, or"
    ):
        jax.jit(checkpoint(lambda x: jax.experimental.io_callback(abs, X, x)))(X)
    with pytest.warns(UserWarning, match=r"tiles=5 found nothing to slice: no piece .* much less memory in slices$"):
        checkpoint(lambda x: x * 2.0, tiles=5)(X)
    with pytest.raises(ValueError, match="changes an NNX object that it closes over"):
        stream = nnx.Rngs(0)
        checkpoint(lambda x: x + jax.random.normal(stream(), ()))(X)
