import pytest

from suite.errors import InputError
from suite.runs.cells.accuracy import expand
from tests.runs.fakes import FakeWorld, matrix

SPARSE = {"methods": ["cats"], "sparsities": [0.5], "tasks": ["t1"]}


def cells(**changes):
    return expand(matrix(**changes), FakeWorld())


def test_every_setting_once_and_dense_once_per_model_and_task():
    found = cells()
    assert len(found) == 2 * (2 * (1 + 2 * 2) + 2)
    assert len({cell.key for cell in found}) == len(found)
    dense = [(cell.model, cell.task.name) for cell in found if cell.mode == "none"]
    assert sorted(dense) == [("a", "decode_perplexity"), ("a", "t1"), ("b", "decode_perplexity"), ("b", "t1")]


def test_embedded_profile_has_33_settings_on_5_tasks():
    from suite.config import load_config

    found = expand(load_config("embedded"), FakeWorld())
    assert len({(c.method, c.mode, c.sparsity, c.fit and c.fit.options) for c in found}) == 33
    assert len(found) == 33 * 5


def test_one_model_at_a_time_and_dense_of_a_task_first():
    found = cells(seeds=[0, 1])
    models = [cell.model for cell in found]
    assert models == sorted(models)
    done: set[tuple] = set()
    for cell in found:
        assert cell.mode == "none" or cell.base in done
        if cell.mode == "none":
            done.add(cell.base)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 4},
        {"seeds": [1]},
        {"models": [{"id": "c"}]},
        {"models": [{"id": "a", "dtype": "bfloat16"}]},
        {"accuracy": [{**SPARSE, "sparsities": [0.6]}]},
        {"accuracy": [{**SPARSE, "tasks": ["t2"]}]},
        {"accuracy": [{**SPARSE, "tasks": [{"name": "t1", "limit": 5}]}]},
        {"accuracy": [{**SPARSE, "tasks": [{"name": "t1", "num_fewshot": 2}]}]},
        {"accuracy": [{**SPARSE, "tasks": [{"name": "t1", "options": {"window": 64}}]}]},
        {"accuracy": [{**SPARSE, "scopes": ["paper"]}]},
        {"accuracy": [{**SPARSE, "methods": ["m-countdown"]}]},
        {"accuracy": [{**SPARSE, "modes": ["practical"]}]},
    ],
)
def test_whatever_decides_the_number_changes_the_key(changes):
    base = {"models": [{"id": "a"}], "accuracy": [SPARSE]}
    assert cells(**base)[0].key != cells(**(base | changes))[0].key


def test_code_and_calibration_change_the_key():
    one = {"models": [{"id": "a"}], "accuracy": [SPARSE]}
    assert expand(matrix(**one), FakeWorld())[0].key != expand(matrix(**one), FakeWorld(code="new"))[0].key
    practical = {"models": [{"id": "a"}], "accuracy": [{**SPARSE, "modes": ["practical"]}]}
    other = practical | {"calibration": {"estimators": ["mean-kth"]}}
    assert cells(**practical)[0].key != cells(**other)[0].key


def test_a_block_has_fits_of_its_own_seeds_and_texts_on_the_documents_of_the_run():
    block = {"methods": ["dense", "cats", "d-countdown"], "modes": ["practical"], "sparsities": [0.5], "tasks": ["t1"]}
    own = block | {"methods": ["cats", "d-countdown"], "fit_seeds": [1, 2], "fit_sources": ["pydoc", "file:x.txt"]}
    found = cells(models=[{"id": "a"}], accuracy=[block, own], predictor={"sources": ["file:y.txt"]})
    fits = [(c.method, c.fit.calibration, c.fit.seed) for c in found if c.fit]
    seeded = [(text, seed) for seed in (1, 2) for text in ("pydoc", "file:x.txt")]
    assert fits == [
        ("cats", "pydoc", 0),
        ("d-countdown", "file:y.txt", 0),
        *(("cats", *one) for one in seeded),
        *(("d-countdown", *one) for one in seeded),
    ]
    assert {c.seed for c in found} == {0}
    assert len({c.base for c in found}) == 1
    assert [c.decided_seed for c in found] == [0, 0, 0, *[1, 1, 2, 2] * 2]


def test_a_block_has_predictors_of_its_own():
    block = {"methods": ["d-countdown"], "modes": ["practical"], "sparsities": [0.5], "tasks": ["t1"]}
    found = cells(models=[{"id": "a"}], accuracy=[block, block | {"predictors": ["gated"]}])
    assert [c.fit.options.predictor for c in found if c.fit] == ["low-rank", "gated"]


def test_a_block_is_for_models_of_its_size():
    small, large = {**SPARSE, "max_parameters": 1e9}, {**SPARSE, "sparsities": [0.6], "min_parameters": 1e9}
    models = [{"id": name} for name in ("a-270M", "b-1B", "c-1.5B-it", "nameless")]
    found = cells(models=models, accuracy=[small, large])
    assert {(c.model, c.sparsity) for c in found} == {
        ("a-270M", 0.5), ("b-1B", 0.6), ("c-1.5B-it", 0.6), ("nameless", 0.5),
    }  # fmt: skip


PAPER_TASKS = {
    "arc_easy",
    "arc_challenge",
    "winogrande",
    "piqa",
    "openbookqa",
    "hellaswag",
    "truthfulqa_mc1",
    "lambada_openai",
}


def test_gpu_profile_has_the_same_documents_for_models_of_every_size():
    from suite.config import load_config

    config = load_config("gpu-accuracy").model_dump()
    config["models"] = [{"id": name} for name in ("a-135M", "b-1.5B")]
    found = expand(matrix(**{name: config[name] for name in ("models", "accuracy")}), FakeWorld())
    tasks = {(c.task.name, c.task.limit) for c in found}
    assert len(tasks) == len({name for name, _ in tasks})  # a task of two limits would be two in every table
    for model in ("a-135M", "b-1.5B"):
        own = {
            c.method
            for c in found
            if c.model == model and (c.mode, c.sparsity, c.scope) == ("practical", 0.8, "scored")
        }
        assert {"cats", "chess", "m-countdown", "m-countdown-cw", "md-countdown", "d-countdown"} <= own
        by_setting: dict[tuple, set] = {}  # averages are of the tasks that all settings have
        for c in found:
            if c.model == model and c.scope == "scored" and c.mode != "none":
                by_setting.setdefault((c.mode, c.sparsity), set()).add(c.task.name)
        assert len(set.intersection(*by_setting.values()) & PAPER_TASKS) == 8


def test_name_and_title_do_not_change_the_key():
    assert [c.key for c in cells()] == [c.key for c in cells(name="other", title="else")]


def test_random_is_seeded_by_the_run():
    found = cells(seeds=[3], accuracy=[{**SPARSE, "methods": ["random"]}])
    assert found[0].params == {"seed": 3}


def test_tasks_with_a_scope_of_their_own_run_once():
    block = {**SPARSE, "scopes": ["paper", "scored"], "tasks": ["wikitext", "decode_perplexity", "t1"]}
    found = cells(models=[{"id": "a"}], accuracy=[block])
    assert [(c.task.name, c.scope) for c in found] == [
        ("wikitext", "all"),
        ("decode_perplexity", "scored"),
        ("t1", "paper"),
        ("t1", "scored"),
    ]


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([{**SPARSE, "methods": ["catz"]}], "unknown method 'catz'; did you mean 'cats'"),
        ([{**SPARSE, "methods": ["nowhere:Class"]}], "cannot be loaded"),
        ([{**SPARSE, "methods": ["json:dumps"]}], "not a subclass"),
        (
            [{**SPARSE, "methods": [{"name": "random", "params": {"sed": 1}}]}],
            "no parameter 'sed'; did you mean 'seed'",
        ),
        ([{**SPARSE, "modes": ["practical"], "methods": ["random"]}], "has no mode 'practical'"),
        ([{**SPARSE, "sparsities": [0.5, 0.50]}], "duplicate cell in accuracy.0 and accuracy.0"),
        ([SPARSE, SPARSE], "duplicate cell in accuracy.0 and accuracy.1"),
    ],
)
def test_bad_settings_are_named_with_their_place(blocks, message):
    with pytest.raises(InputError, match=message) as caught:
        cells(accuracy=blocks)
    assert "\n" not in str(caught.value)


def test_embedded_profile_times_every_cpu_kernel_at_every_level():
    from suite.config import load_config
    from suite.runs.cells.speed import expand_speed

    cases = [cell.case for cell in expand_speed(load_config("embedded"), FakeWorld())]
    timed = {(case.level, case.method) for case in cases if case.backend == "numba-cpu"}
    layers = {("layer", "given"), ("layer", "cats"), ("layer", "m-countdown")}
    assert timed == {("op", "given"), *layers, ("decode", "m-countdown"), ("decode", "d-countdown")}


def test_decode_rows_of_real_weights_share_the_fits_of_the_matrix():
    from suite.config import load_config
    from suite.runs.cells.speed import expand_speed

    config, world = load_config("embedded"), FakeWorld()
    fits = {cell.fit_key for cell in expand(config, world)}
    decode = [cell for cell in expand_speed(config, world) if cell.case.level == "decode"]
    sparse = [cell for cell in decode if cell.case.method != "dense"]
    assert len(sparse) == 3
    assert {cell.fit_key for cell in sparse} <= fits
    assert {cell.fit_key for cell in decode if cell not in sparse} == {None}
    assert sparse[0].key_fields["fit"] == sparse[0].fit_key


@pytest.mark.parametrize(
    ("kinds", "methods", "expected"),
    [
        (["low-rank"], ["dejavu", "d-countdown"], ("low-rank", 9, 3, "zero")),
        (["gated"], ["d-countdown"], ("gated", 9, 3, "calibrated")),
        (["ternary"], ["d-countdown"], ("low-rank", 9, 3, "zero")),  # which no row times
    ],
)
def test_decode_rows_take_a_predictor_that_the_matrix_names_and_the_method_can_have(kinds, methods, expected):
    from suite.runs.cells.speed import expand_speed

    predictor = {"predictors": kinds, "ranks": [9, None], "rounds": 3, "estimators": ["zero", "calibrated"]}
    speed = {"shapes": ["embedded"], "methods": methods, "sparsities": [0.5], "level": "decode"}
    config = matrix(speed=[speed | {"backends": ["numba-cpu"]}], predictor=predictor)
    told = {
        cell.case.method: (cell.fit.options.predictor, cell.case.rank, cell.fit.options.rounds, cell.fit.estimator)
        for cell in expand_speed(config, FakeWorld())
        if cell.fit
    }
    assert told == dict.fromkeys(methods, expected)
    for cell in expand_speed(config, FakeWorld()):
        if cell.fit:  # what is timed, and whose bytes are counted, is what is fitted
            assert (cell.case.predictor or "low-rank") == cell.fit.options.predictor


def test_decode_rows_of_random_weights_need_no_fit():
    from suite.config import load_config
    from suite.runs.cells.speed import expand_speed

    cells_ = [c for c in expand_speed(load_config("gpu-decode"), FakeWorld()) if c.case.model_shape != "embedded"]
    assert cells_
    assert {cell.fit_key for cell in cells_} == {None}


def test_speed_settings_that_no_column_tells_apart_are_refused():
    """In one block or two; what a column shows, the parameters of other levels, and a device of its own are no twins."""
    from suite.config import build_config
    from suite.runs.cells.speed import expand_speed

    def found(*params, **more):
        common = {"shapes": ["phi-4"], "sparsities": [0.8], "backends": ["torch", "numba-cpu", "numba-cuda"]} | more
        blocks = [common | {"methods": ["dense", {"name": "md-countdown", "params": one}]} for one in params]
        return expand_speed(build_config({"name": "n", "speed": blocks}, "here"), FakeWorld())

    apart = found({}, {"exact": "gate"}, {"rank": 32})
    assert len(apart) == 2 * (1 + 3)
    assert {(c.columns["rank"], c.columns["exact_projection"]) for c in apart if c.case.rank} == {
        (64, "up"), (64, "gate"), (32, "up"),
    }  # fmt: skip
    auto = found({"exact": "auto"}, {"exact": "up"}, level="decode", shapes=["embedded"], backends=["numba-cpu"])
    assert [c.columns["exact_projection"] for c in auto] == [None, "auto", "up"]
    for one, name in (({"exact": "up"}, "exact"), ({"fit_rounds": 2}, "fit_rounds")):
        told = (
            rf"two settings of phi-4 layer md-countdown {name}=.* differ in {name} alone, which no column of speed\.csv"
        )
        with pytest.raises(InputError, match=told):
            found({}, one)
    with pytest.raises(InputError, match=r"speed\.1: rank 9999 of method md-countdown"):
        found({}, {"rank": 9999})


def test_decode_rows_take_the_fits_of_their_parameters_predictor_and_input():
    from suite.config import build_config
    from suite.runs.cells.speed import expand_speed

    md = {"name": "md-countdown", "params": {"rank": 16, "exact": "auto"}}
    more = {"level": "decode", "shapes": ["embedded"], "sparsities": [0.8], "backends": ["numba-cpu"]}
    blocks = [
        more | {"methods": [md, {"name": "md-countdown", "params": {"rank": 32}}, "griffin", "m-countdown"]},
        more | {"methods": ["d-countdown"], "predictors": ["low-rank", "gated"], "predictor_inputs": ["mlp", "block"]},
    ]
    predictor = {"predictors": ["low-rank", "gated"], "ranks": [24], "predictor_inputs": ["mlp", "block"]}
    config = build_config({"name": "n", "speed": blocks, "predictor": predictor}, "here")
    found = expand_speed(config, FakeWorld())
    asked = {
        (cell.case.method, cell.case.rank, cell.case.predictor, cell.case.predictor_input): cell.fit for cell in found
    }
    assert {key: fit and (fit.params, fit.options and fit.options.predictor_input) for key, fit in asked.items()} == {
        ("md-countdown", 16, None, "mlp"): (md["params"], None),
        ("md-countdown", 32, None, "mlp"): ({"rank": 32}, None),
        ("griffin", None, None, None): None,
        ("m-countdown", None, None, None): ({}, None),
        ("d-countdown", 24, None, None): ({}, "mlp"),
        ("d-countdown", 24, "gated", "mlp"): ({}, "mlp"),
        ("d-countdown", 24, "gated", "block"): ({}, "block"),
    }
    assert len({cell.fit_key for cell in found}) == len({cell.key for cell in found}) == len(found) == 7
    assert {cell.fit.options.predictor for cell in found if cell.case.predictor} == {"gated"}


def test_a_method_that_is_added_leaves_the_cells_of_the_others_as_they_are(monkeypatch):
    from suite import code
    from suite.config import load_config
    from suite.registry import METHODS
    from suite.runs.machine import LocalWorld

    world = LocalWorld(load_config("embedded"))
    cells_ = [(kind, name) for kind in ("accuracy", "speed") for name in METHODS]
    before = {cell: world.code(*cell) for cell in cells_}
    assert len(set(before.values())) == len(before)
    monkeypatch.setitem(METHODS, "mine", "tests.contract.third_party:Mine")
    assert {cell: world.code(*cell) for cell in cells_} == before
    assert world.code("accuracy", "mine") == world.code("accuracy", "tests.contract.third_party:Mine")
    assert world.code("accuracy", "mine") not in before.values()
    own = {target.partition(":")[0] for target in METHODS.values()}
    for kind in ("accuracy", "speed"):
        assert not own & code.reached((code.WORKER,), code.CLOSED.get(kind, ()), code.others(kind))


def test_how_threads_wait_is_in_the_keys_of_times_on_a_cpu_only():
    from suite.config import load_config
    from suite.runs.cells.speed import expand_speed

    class Spinning(FakeWorld):
        def openmp_waiting(self):
            return "active"

    by_name = {world: expand_speed(load_config("small"), world()) for world in (FakeWorld, Spinning)}
    kinds = set()
    for passive, active in zip(*by_name.values(), strict=True):
        kinds.add(passive.case.device)
        assert (passive.key != active.key) == (passive.case.device == "cpu")
    assert "cpu" in kinds


def test_the_blocks_input_may_be_for_the_gated_predictors_of_one_block():
    block = {**SPARSE, "methods": ["d-countdown"], "modes": ["practical"], "predictors": ["gated"]}
    found = cells(accuracy=[block], predictor={"predictor_inputs": ["mlp", "block"]})
    assert {cell.fit.options.predictor_input for cell in found if cell.fit} == {"mlp", "block"}
