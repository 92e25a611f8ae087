"""Policies by name: what `get` takes and refuses, `names`, `describe`, `register`."""

import functools

import jax
import pytest

from jaxckpt import policies
from jaxckpt.policies import registry

FACTORIES = {
    "save_only_these_names": "policy='save:q,k'",
    "save_any_names_but_these": "policy='except:q,k'",
    "save_anything_except_these_names": "policy='except:q,k'",
    "save_and_offload_only_these_names": "policy='save:q+offload:k'",
    "save_from_both_policies": "policy='dots+save:q'",
    "offload_dot_with_no_batch_dims": "offload_dot_with_no_batch_dims('device', 'pinned_host')",
}


@pytest.fixture
def fresh_registry(monkeypatch):
    """A copy of the registry that goes with the test."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


@pytest.mark.parametrize("name", policies.names())
def test_every_name_is_a_policy(name):
    policy = policies.get(name)
    assert isinstance(policy, policies.Policy)
    assert str(policy) == name
    assert policies.get(policy) is policy


@pytest.mark.parametrize("name", FACTORIES)
def test_a_factory_that_was_not_called_is_refused(name):
    with pytest.raises(TypeError) as caught:
        policies.get(getattr(jax.checkpoint_policies, name))
    message = str(caught.value)
    assert message.startswith(f"jax.checkpoint_policies.{name} makes policies and is not one")
    assert FACTORIES[name] in message
    if "policy=" in message:
        assert "call it first, as in policy=" not in message, "a keyword argument is not a call"


def test_all_of_jaxs_factories_are_known():
    own = {name for name in dir(jax.checkpoint_policies) if not name.startswith("_")}
    assert own - set(policies.names()) == set(FACTORIES)


@pytest.mark.parametrize(
    "policy",
    [
        jax.checkpoint_policies.save_only_these_names("q"),
        jax.checkpoint_policies.save_any_names_but_these("q"),
        jax.checkpoint_policies.save_from_both_policies(jax.checkpoint_policies.dots_saveable, lambda *_, **__: False),
        jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
        jax.checkpoint_policies.dots_saveable,
        functools.partial(lambda keep, prim, *_, **__: keep, True),
    ],
    ids=["names", "names but", "both", "offload", "own", "partial"],
)
def test_a_policy_function_is_taken_as_it_is(policy):
    assert policies.get(policy).for_tags(("q",)) is policy


def test_jaxs_broken_policy_is_refused():
    with pytest.raises(ValueError, match=r"save_anything_except_these_names saves every value.*policy='except:NAMES'"):
        policies.get(jax.checkpoint_policies.save_anything_except_these_names("q"))


@pytest.mark.parametrize("policy", [3, True, None, ["dots"], ("dots", "save:q"), b"dots", 0.25])
def test_what_is_no_policy_is_refused(policy):
    with pytest.raises(TypeError) as caught:
        policies.get(policy)
    assert f"got {policy!r} of type {type(policy).__name__}" in str(caught.value)
    assert "'dots+save:attn'" in str(caught.value)


def test_policies_that_choose_are_described():
    assert policies.describe("cheap+dots").startswith("cheap  the fewest bytes under which no matrix product")
    assert "within a fraction (0 to 1)" in policies.describe("budget:0.25")
    assert "within bytes per block" in policies.describe("budget:300MiB")


def test_describe_lists_every_name_and_form():
    lines = policies.describe().splitlines()
    first = [line.split()[0] for line in lines]
    assert first == [*policies.names(), "save:NAMES", "except:NAMES", "offload:NAMES", "budget:F", "budget:SIZE"]
    column = lines[0].index("all that autodiff asks for")
    assert all(line[column - 1] == " " and line[column] != " " for line in lines), "what is kept stands in one column"


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("nothing", ["nothing  only the block's input"]),
        ("full", ["full  the same as nothing: only the block's input"]),
        ("save:q", ["save:q  the values tagged by checkpoint_name that match"]),
        (
            "except:q + offload:k",
            [
                "except:q   every tagged value but those that match",
                "offload:k  the values tagged by checkpoint_name that match, moved to pinned host memory",
            ],
        ),
    ],
)
def test_describe_an_expression(text, lines):
    assert policies.describe(text).splitlines() == lines


def test_describe_a_recipe_lists_its_tags():
    text = policies.describe("minimal_with_context")
    assert "MaxText" in text
    for tag in ("query_proj", "context", "out_proj", "mlpwo"):
        assert tag in text


def test_describe_refuses_an_unknown_name():
    with pytest.raises(ValueError, match="unknown policy 'nothng'; did you mean 'nothing'"):
        policies.describe("nothng")


@pytest.mark.parametrize("policy", [policies.get("dots"), jax.checkpoint_policies.dots_saveable, 3])
def test_describe_takes_names_and_expressions_only(policy):
    with pytest.raises(TypeError, match=r"such as 'dots\+save:attn'.*; got "):
        policies.describe(policy)


@pytest.mark.usefixtures("fresh_registry")
class TestRegister:
    def test_an_expression(self):
        policies.register("mine", "dots+save:q")
        assert policies.names()[-1] == "mine"
        assert policies.describe("mine") == "mine  dots+save:q"
        assert policies.get("mine").terms == policies.get("dots+save:q").terms
        assert policies.get("mine+offload:k").terms == policies.get("dots+save:q+offload:k").terms

    def test_a_function_is_described_by_its_docstring(self):
        def keep_all(prim, *_, **__):
            """Keeps it all.

            Every value.
            """
            return True

        policies.register("all-of_it2", keep_all)
        assert policies.describe("all-of_it2") == "all-of_it2  Keeps it all."
        assert policies.get("all-of_it2").for_tags(()) is keep_all

    def test_what_it_keeps_in_words(self):
        policies.register("mine", "save:q", keeps="the queries")
        assert policies.describe("mine") == "mine  the queries"
        assert "the queries" in policies.describe()

    def test_what_it_keeps_is_one_line(self):
        policies.register("mine", "save:q", keeps="the queries\nof every head")
        assert policies.describe("mine") == "mine  the queries"

    @pytest.mark.parametrize("doc", [None, "", "  ", "\n"])
    def test_a_function_without_words_is_described_by_its_name(self, doc):
        def keep_all(prim, *_, **__):
            return True

        keep_all.__doc__ = doc
        policies.register("mine", keep_all)
        assert policies.describe("mine") == "mine  keep_all"

    @pytest.mark.parametrize(
        ("policy", "keeps"),
        [
            (policies.get("dots+save:q"), "dots+save:q"),
            (functools.partial(lambda keep, prim, *_, **__: keep, True), "partial"),
        ],
        ids=["Policy", "partial"],
    )
    def test_an_object_is_not_described_by_the_docstring_of_its_class(self, policy, keeps):
        policies.register("mine", policy)
        assert policies.describe("mine") == f"mine  {keeps}"

    def test_a_near_match_knows_it(self):
        policies.register("pairformer", "save:q")
        with pytest.raises(ValueError, match="did you mean 'pairformer'"):
            policies.get("parformer")

    @pytest.mark.parametrize("name", [*policies.names()[:3], "minimal_flash"])
    def test_a_taken_name_is_refused(self, name):
        with pytest.raises(ValueError, match=f"policy '{name}' exists already: .*register under another name"):
            policies.register(name, "nothing")

    @pytest.mark.parametrize("name", ["", "a b", "save:x", "a+b", "a,b", "*", "-", "_", 3, None])
    def test_what_is_no_name_is_refused(self, name):
        with pytest.raises(ValueError) as caught:
            policies.register(name, "nothing")
        assert f"letters, digits, '_' and '-'; got {name!r}" in str(caught.value)

    @pytest.mark.parametrize(
        ("policy", "error"),
        [("nothng", ValueError), (jax.checkpoint_policies.save_only_these_names, TypeError), (3, TypeError)],
    )
    def test_what_is_no_policy_is_refused_and_not_registered(self, policy, error):
        with pytest.raises(error):
            policies.register("mine", policy)
        assert "mine" not in policies.names()


def test_the_registry_is_as_it_was():
    assert "mine" not in policies.names()
