"""Choices to a reward model to a policy, with everything the real run does, on a model of 90 thousand weights."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors import safe_open

from tunesmith.errors import DataError, FolderError, ModelError, RecipeError, TunesmithError
from tunesmith.evaluate.rewarding import FIRST_PROBLEMS
from tunesmith.folder import RunFolder, read_json, read_jsonl, write_jsonl
from tunesmith.methods.rollout import read_rollout
from tunesmith.model.adapters import load_adapter
from tunesmith.model.load import load, resolve
from tunesmith.pipeline import tune
from tunesmith.pipeline.again import compare_runs, evaluate_again
from tunesmith.pipeline.pairs import halves, prepare_pairs
from tunesmith.pipeline.reward import JUDGE, REWARD, load_reward, pair_rewards
from tunesmith.pipeline.run import run
from tunesmith.recipe import load_recipe, parse_recipe
from tunesmith.screen import Screen
from tunesmith.train.fit import fit as true_fit
from tunesmith.types import Comparison, Message
from tunesmith.world import World

Raw = dict[str, Any]


@pytest.fixture(scope="session")
def choices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Choices that a tiny model can learn: capitals are better."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=4)) for _ in range(160)]
    rows = [{"prompt": f"Say {n % 120}", "chosen": w.upper(), "rejected": w} for n, w in enumerate(words)]
    path = tmp_path_factory.mktemp("choices") / "choices.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def common(tiny_model_folder: Path, choices: Path) -> Raw:
    return {
        "base": str(tiny_model_folder),
        "data": {"train": str(choices), "valid": 0.15, "test": 0.15, "near_duplicates": 1.0},
        "train": {"learning_rate": 0.01, "evaluations": 2},
        "evaluate": {"forgetting": False, "rows": 16, "valid_rows": 8},
        "lora": {"rank": 4},
    }


@pytest.fixture(scope="session")
def reward_run(common: Raw, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    out = tmp_path_factory.mktemp("reward") / "run"
    return run(parse_recipe({**common, "method": "reward", "out": str(out)}))


@pytest.fixture
def policy(common: Raw, reward_run: RunFolder, tmp_path: Path) -> Callable[..., Raw]:
    """A recipe for a policy; keys may be replaced."""

    def recipe(method: str, **keys: Any) -> Raw:
        few = {"rollouts": 3, "prompts": 4, "group": 3}
        base = {
            **common,
            "method": method,
            "reward": str(reward_run.path),
            "policy": few,
            "task": {"max_new_tokens": 6},
        }
        return {**base, "out": str(tmp_path / method), **keys}

    return recipe


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.safetensors"))}


def test_a_reward_model_learns_what_people_chose_and_says_how_surely(reward_run: RunFolder) -> None:
    results = read_json(reward_run.results)
    assert results["models"][REWARD]["pair_accuracy"]["value"] > 0.9
    assert results["models"][JUDGE]["pair_accuracy"]["value"] > 0.9
    assert results["verdict"]["decision"] == "ship"
    length = results["baselines"]["length"]["pair_accuracy"]
    assert length["value"] == 0.5
    assert length["low"] < 0.4 < 0.6 < length["high"]  # every pair is a tie, which is not to know that all are
    assert reward_run.report.is_file()


def test_a_finished_reward_run_with_a_damaged_judge_is_refused(reward_run: RunFolder, tmp_path: Path) -> None:
    copy = shutil.copytree(reward_run.path, tmp_path / "copy")
    recipe = load_recipe(copy / "recipe.yaml").model_copy(update={"out": str(copy)})
    assert run(recipe).path == copy
    (copy / JUDGE / "adapter_config.json").unlink()
    with pytest.raises(FolderError, match=f"{JUDGE}/ is not what it handed over: adapter_config.json is missing"):
        run(recipe)


def test_several_pairs_of_a_prompt_are_one_observation(reward_run: RunFolder) -> None:
    prompts = {json.dumps(line["prompt"]) for line in read_jsonl(reward_run.answers(REWARD))}
    results = read_json(reward_run.results)
    assert results["data"]["test"] == 16
    assert results["models"][REWARD]["pair_accuracy"]["n"] == len(prompts) < 16


def test_two_reward_models_are_compared_by_how_often_they_are_right(reward_run: RunFolder) -> None:
    results = read_json(reward_run.results)
    found = results["models"][REWARD]["pair_accuracy"]
    ((metric, first, second, change, _),) = compare_runs(reward_run.path, reward_run.path)
    assert metric == "pair_accuracy"  # the scores themselves have a scale of their own in each run
    assert first == second == f"{found['value']:.4f}"
    assert f"n = {found['n']})" in change


def test_a_reward_model_is_held_against_other_choices(reward_run: RunFolder, choices: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in choices.read_text(encoding="utf-8").splitlines()]
    turned = [
        {**row, "prompt": f"{row['prompt']}!", "chosen": row["rejected"], "rejected": row["chosen"]} for row in lines
    ]
    write_jsonl(tmp_path / "turned.jsonl", turned)
    copy = shutil.copytree(reward_run.path, tmp_path / "copy")
    alike, other = (
        evaluate_again(copy, str(path), "", Screen(quiet=True)) for path in (choices, tmp_path / "turned.jsonl")
    )
    for name in (REWARD, JUDGE):
        assert alike["pair_accuracy"][name]["value"] > 0.9
        assert other["pair_accuracy"][name]["value"] < 0.1
    assert alike["pair_accuracy"]["length"]["value"] == 0.5
    assert alike["contrasts"][0]["difference"]["low"] > 0.3
    assert read_json(copy / "results.json")["test_reads"] == 2  # the run's own rows are among the first file's
    with pytest.raises(RecipeError, match="one update"):
        evaluate_again(copy, str(choices), "lora", Screen(quiet=True))


@pytest.mark.parametrize(("method", "update"), [("ppo", "lora"), ("dpo", "full")])
def test_a_policy_is_evaluated_by_what_judged_it(
    policy: Callable[..., Raw], method: str, update: str, tmp_path: Path
) -> None:
    folder = run(parse_recipe(policy(method, update=update, task={"max_new_tokens": 6, "also": ["valid_json"]})))
    results = read_json(folder.results)
    own = [{"prompt": line["prompt"]} for line in read_jsonl(folder.answers("base"))]
    write_jsonl(tmp_path / "own.jsonl", own)
    again = evaluate_again(folder.path, str(tmp_path / "own.jsonl"), "", Screen(quiet=True))
    assert again["win_rate_by"] == "judge"
    for key in ("win_rate", "kl"):  # the same prompts, the same random numbers
        assert again[key] == pytest.approx(results[key], abs=1e-5)
    metrics = again["arms"][update]["metrics"]
    assert metrics["judge_score"]["value"] == pytest.approx(results["arms"][update]["metrics"]["judge_score"]["value"])
    assert "valid_json" in metrics
    assert read_json(folder.results)["test_reads"] == 2
    choices = [{"prompt": f"Tell {n % 20}", "chosen": "A", "rejected": "b" * (n + 1)} for n in range(40)]
    write_jsonl(tmp_path / "others.jsonl", choices)
    others = evaluate_again(folder.path, str(tmp_path / "others.jsonl"), update, Screen(quiet=True))
    assert others["rows"] == others["win_rate"]["n"] == 20
    assert read_json(folder.results)["test_reads"] == 2


def test_a_policy_evaluated_by_another_reward_than_its_run_had_says_so(
    policy: Callable[..., Raw], tmp_path: Path
) -> None:
    own = tmp_path / "own.py"
    own.write_text("def short(answer, item):\n    return -len(answer)\n", encoding="utf-8")
    folder = run(parse_recipe(policy("grpo", reward=f"{own}:short")))
    write_jsonl(tmp_path / "others.jsonl", [{"prompt": f"Tell {n}"} for n in range(12)])
    own.write_text("def short(answer, item):\n    return len(answer)\n", encoding="utf-8")
    told = io.StringIO()
    screen = Screen(console=Console(file=told, soft_wrap=True))
    found = evaluate_again(folder.path, str(tmp_path / "others.jsonl"), "", screen)
    assert found["win_rate_by"] == "reward"
    assert "the file of reward.by has changed since the run" in told.getvalue()


def test_reward_and_judge_learn_from_disjoint_halves(choices: Path) -> None:
    lines = choices.read_text(encoding="utf-8").splitlines()
    rows = [
        Comparison(
            prompt=(Message(role="user", content=json.loads(line)["prompt"]),),
            chosen=Message(role="assistant", content="a"),
            rejected=Message(role="assistant", content="b"),
            id=str(number),
            source=f"rows:{number}",
        )
        for number, line in enumerate(lines)
    ]
    first, second = halves(rows, seed=0)
    assert sorted(first + second) == list(range(len(rows)))
    assert not {rows[i].prompt for i in first} & {rows[i].prompt for i in second}


def test_all_raters_of_a_pair_are_in_one_half() -> None:
    def choice(number: int, rater: str) -> Comparison:
        sides = [Message(role="assistant", content=f"{side}{number}") for side in "ab"]
        better, worse = sides if rater == "one" else sides[::-1]
        prompt = (Message(role="user", content="Say"),)
        row = {"prompt": prompt, "chosen": better, "rejected": worse, "rater": rater}
        return Comparison(**row, id=f"{number}{rater}", source=f"rows:{number}")

    rows = [choice(number, rater) for number in range(20) for rater in ("one", "two")]
    first, second = ({rows[i].source for i in half} for half in halves(rows, seed=0))
    assert first
    assert second
    assert not first & second


def test_scores_of_reference_answers_have_mean_0_and_variance_1(reward_run: RunFolder, common: Raw) -> None:
    from tunesmith.pipeline.pairs import prepare_pairs
    from tunesmith.screen import Screen

    model = load_reward(str(reward_run.path), REWARD, World())
    recipe = parse_recipe({**common, "method": "reward"})
    valid = prepare_pairs(recipe, model.vocabulary, Screen(quiet=True)).groups["valid"][:8]
    scores = pair_rewards(model, valid)
    assert abs(scores.mean()) < 1e-4
    assert abs(scores.std() - 1) < 1e-4


@pytest.mark.parametrize("method", ["dpo", "ppo", "grpo"])
def test_a_policy_run_ends_with_a_judged_model(policy: Callable[..., Raw], method: str) -> None:
    folder = run(parse_recipe(policy(method)))
    results = read_json(folder.results)
    assert results["task"]["metric"] == "judge_score"
    assert results["win_rate_by"] == "judge"
    assert next(point["step"] for point in results["curve"]) == 0
    assert sum(point["chosen"] for point in results["curve"]) == 1
    asked = [line["prompt"][0]["content"] for line in read_jsonl(folder.answers("lora"))]
    assert len(set(asked)) == len(asked) == results["data"]["test"] == 16
    assert f"{len(asked)} held-out prompts" in results["verdict"]["reasons"][0]
    assert ("rollouts" in results) == (method != "dpo")
    assert (folder.adapter / "adapter_model.safetensors").is_file()
    assert folder.report.is_file()
    assert run(parse_recipe(policy(method))).path == folder.path


def test_a_look_beyond_the_limit_of_distance_is_not_handed_over_and_the_verdict_says_so(
    policy: Callable[..., Raw], common: Raw, tmp_path: Path
) -> None:
    few = {"rollouts": 3, "prompts": 4, "group": 3}
    often = {**common["train"], "evaluations": 3, "patience": 9}
    own = tmp_path / "own.py"
    own.write_text("def upper(answer, item):\n    return -float(sum(map(str.islower, answer)))\n", encoding="utf-8")
    told = {"reward": f"{own}:upper", "train": often}
    free = read_json(run(parse_recipe(policy("grpo", out=str(tmp_path / "free"), policy=few, **told))).results)
    first, *_, last = sorted(look["kl"] for look in free["curve"][1:])
    limit = {**few, "kl_limit": (first + last) / 2}
    held = read_json(run(parse_recipe(policy("grpo", out=str(tmp_path / "held"), policy=limit, **told))).results)
    assert any(look["beyond_limit"] > 0 for look in held["curve"][1:])
    (chosen,) = (look for look in held["curve"] if look["chosen"])
    assert chosen["kl"] < limit["kl_limit"]
    assert "could not be chosen, whatever" in held["verdict"]["reasons"][-1]
    assert not any("kl_limit" in reason for reason in free["verdict"]["reasons"])


@pytest.mark.parametrize(("method", "batch"), [("ppo", None), ("grpo", None), ("ppo", 5), ("grpo", 64), ("dpo", None)])
def test_compute_counts_what_was_drawn_and_read_by_reference_and_reward(
    policy: Callable[..., Raw], common: Raw, method: str, batch: int | None
) -> None:
    raw = policy(method, train={**common["train"], "batch": batch})
    results = read_json(run(parse_recipe(raw)).results)
    plan, train = results["plan"]["lora"], results["arms"]["lora"]["train"]
    assert plan["measured"]["flops"] == train["flops"]
    # Per weight and trained token. Without gradients: drawn, values, reference and reward for 4 epochs; all but values;
    # the reference alone.
    asked = {"ppo": 4 + 2 * 4 / 4, "grpo": 4 + 2 * 3, "dpo": 4 + 2}[method]
    weights = train["flops"] / asked / train["tokens"]
    model = load(raw["base"], World())
    met, about = model.product_parameters, 1e-6
    if method == "dpo":  # of its pairs the head meets the answers alone
        pairs = prepare_pairs(parse_recipe(raw), model.vocabulary, Screen(quiet=True))
        found = [example for group in pairs.groups["train"] for example in group]
        scored = sum(float(example.weights.sum()) for example in found) / sum(len(example.tokens) for example in found)
        met -= (1 - scored) * model.head_weight.numel()
        about = 0.02  # the last step of an epoch begins the next, with pairs of other lengths
    assert weights == pytest.approx(met, rel=about)


def test_compute_of_a_reward_model_counts_no_head_over_the_vocabulary(reward_run: RunFolder, common: Raw) -> None:
    train = read_json(reward_run.results)["models"][REWARD]["train"]
    model = load(common["base"], World())
    weights = train["flops"] / 4 / train["tokens"]
    assert weights == pytest.approx(model.product_parameters - model.head_weight.numel(), rel=0.02)


def test_a_reward_that_is_a_function_costs_no_model(policy: Callable[..., Raw], tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text("def letters(answer, item):\n    return float(sum(map(ord, answer)))\n", encoding="utf-8")
    raw = policy("grpo", reward=f"{own}:letters")
    train = read_json(run(parse_recipe(raw)).results)["arms"]["lora"]["train"]
    weights = train["flops"] / (4 + 2 * 2) / train["tokens"]
    assert weights == pytest.approx(load(raw["base"], World()).product_parameters)


def test_full_tuning_keeps_a_frozen_copy_as_its_reference(policy: Callable[..., Raw]) -> None:
    folder = run(parse_recipe(policy("ppo", update="full")))
    results = read_json(folder.results)
    assert results["kl"]["value"] != 0.0
    (weights,) = folder.model.glob("*.safetensors")
    with safe_open(weights, "numpy") as file:
        assert not [name for name in file.keys() if name.startswith("value_head")]  # noqa: SIM118
    assert load(str(folder.model), World()).packs


@pytest.mark.parametrize("method", ["dpo", "ppo", "grpo"])
def test_a_killed_policy_run_ends_with_the_same_weights(
    policy: Callable[..., Raw], method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def dies(*args: Any, **kwargs: Any) -> Any:
        for number, done in enumerate(true_fit(*args, **kwargs), start=1):
            yield done
            if number == 2:
                raise Killed

    from functools import partial

    monkeypatch.setattr(tune, "Optimization", partial(tune.Optimization, checkpoint_seconds=0.0))
    whole = run(parse_recipe(policy(method, out=str(tmp_path / "whole"))))
    with monkeypatch.context() as patched:
        patched.setattr("tunesmith.pipeline.loop.fit", dies)
        with pytest.raises(Killed):
            run(parse_recipe(policy(method, out=str(tmp_path / "again"))))
    again = run(parse_recipe(policy(method, out=str(tmp_path / "again"))))
    assert hashes(whole.adapter) == hashes(again.adapter)
    assert read_json(whole.results)["curve"] == read_json(again.results)["curve"]


def test_every_rollout_is_kept_and_grpo_leaves_out_groups_that_say_nothing(
    policy: Callable[..., Raw], tmp_path: Path
) -> None:
    own = tmp_path / "own.py"
    own.write_text("def same(answer, item):\n    return 1.0\n", encoding="utf-8")
    folder = run(parse_recipe(policy("grpo", reward=f"{own}:same")))
    rollouts = sorted((folder.path / "rollouts" / "lora").glob("*.safetensors"))
    assert len(rollouts) == 3
    groups, statistics = read_rollout(rollouts[0])
    assert statistics["alike"] == 4.0
    assert all(not np.any(example.extra["advantages"]) for group in groups for example in group)
    assert read_json(folder.results)["task"]["metric"] == "reward"


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_a_reward_function_that_throws_is_told_and_counted_and_the_run_goes_on(
    policy: Callable[..., Raw], method: str, tmp_path: Path
) -> None:
    own = tmp_path / "own.py"
    body = "    if sum(map(ord, answer)) % 4:\n        raise KeyError(answer)\n    return -9.0\n"
    own.write_text(f"def throws(answer, item):\n{body}", encoding="utf-8")
    told = io.StringIO()
    screen = Screen(console=Console(file=told, soft_wrap=True))
    folder = run(parse_recipe(policy(method, reward=f"{own}:throws")), screen=screen)
    results = read_json(folder.results)
    assert sum(line["unscored"] for line in results["rollouts"]) > 0
    assert all(0 < arm["metrics"]["unscored"]["value"] < 1 for arm in results["arms"].values())
    lines = [line for line in told.getvalue().splitlines() if "an answer has no score" in line]
    assert "counts -1, one with a score -9 on average: set reward.missing_end below your scores" in told.getvalue()
    assert len(set(lines)) == len(lines) == FIRST_PROBLEMS  # each once, and not thousands
    assert all(f"{own}:throws, item " in line and "the function fails: KeyError: " in line for line in lines)


def test_a_reward_function_that_scores_nothing_stops_the_run_before_training(
    policy: Callable[..., Raw], tmp_path: Path
) -> None:
    own = tmp_path / "own.py"
    own.write_text("def throws(answer, item):\n    raise KeyError(answer)\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"none of 16 answers \(raised KeyError\)"):
        run(parse_recipe(policy("grpo", reward=f"{own}:throws")))


def test_a_run_is_the_base_of_the_next(policy: Callable[..., Raw], tiny_model_folder: Path) -> None:
    first = run(parse_recipe(policy("dpo")))
    merged = load(str(first.path), World())
    adapted = load(str(tiny_model_folder), World())
    load_adapter(adapted, first.adapter)
    import torch

    tokens = torch.arange(1, 30)[None]
    with torch.no_grad():
        one = merged.body(input_ids=tokens, position_ids=torch.arange(29)[None], attend=_alone(29)).last_hidden_state
        two = adapted.body(input_ids=tokens, position_ids=torch.arange(29)[None], attend=_alone(29)).last_hidden_state
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    assert resolve(str(first.path)) == first.path / "merged"


def _alone(length: int) -> Any:
    from tunesmith.model.attention import PackedAttention
    from tunesmith.tensors import Layout

    return PackedAttention(Layout(lengths=(length,), parents=(-1,)))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"reward": ""}, "needs a reward"),
        ({"reward": "nowhere"}, "not a finished run"),
        ({"update": ["lora", "full"]}, "trains one model"),
        ({"update": "economy"}, "has no economy"),
        ({"reward": "own.py:nothing"}, "no such file"),
        ({"policy": {"kl": 0, "kl_target": 3}}, "a price of 0 stays 0"),
    ],
)
def test_a_policy_without_what_it_needs_is_refused_before_a_folder_is_made(
    policy: Callable[..., Raw], keys: Raw, said: str
) -> None:
    raw = policy("ppo", **keys)
    with pytest.raises(TunesmithError, match=said):
        run(parse_recipe(raw))
    assert not Path(raw["out"]).exists()


def test_the_reward_that_is_trained_on_is_no_judge(
    policy: Callable[..., Raw], reward_run: RunFolder, tmp_path: Path
) -> None:
    copy = shutil.copytree(reward_run.path, tmp_path / "copy")
    shutil.rmtree(copy / JUDGE)  # as with preference.halves: false
    raw = policy("ppo", reward={"by": str(copy), "judge": f"{tmp_path}/./copy"})
    with pytest.raises(RecipeError, match=r"reward\.judge: the judge is the very model that is trained on"):
        run(parse_recipe(raw))
    assert not Path(raw["out"]).exists()


def test_imitation_of_prompts_without_answers_is_refused(policy: Callable[..., Raw], tmp_path: Path) -> None:
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Say {n}"}) + "\n" for n in range(30)), encoding="utf-8")
    raw = policy("ppo", data={"train": str(rows), "near_duplicates": 1.0}, policy={"mix": 0.5, "prompts": 4})
    with pytest.raises(RecipeError, match=r"policy\.mix: .*without answers to imitate"):
        run(parse_recipe(raw))
    assert not Path(raw["out"]).exists()


@pytest.mark.parametrize("what", ["definitions", "calls"])
def test_prompts_whose_tools_the_template_leaves_out_are_refused(
    what: str, policy: Callable[..., Raw], tmp_path: Path
) -> None:
    function = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    called = [{"role": "assistant", "content": "", "tool_calls": [function]}, {"role": "tool", "content": "1"}]
    prompts = [[{"role": "user", "content": f"Say {n}"}, *(called if what == "calls" else [])] for n in range(40)]
    tools = {"tools": [function]} if what == "definitions" else {}
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": prompt, **tools} for prompt in prompts])
    data = {"train": str(tmp_path / "rows.jsonl"), "valid": 0.2, "test": 0.2, "near_duplicates": 1.0}
    with pytest.raises(DataError, match=rf"rows.jsonl:\d+: .* writes no tool {what}"):
        run(parse_recipe(policy("grpo", data=data)))


def test_a_reward_model_is_no_base(policy: Callable[..., Raw], reward_run: RunFolder) -> None:
    with pytest.raises(ModelError, match="gives scores, not answers"):
        run(parse_recipe(policy("dpo", base=str(reward_run.path))))


def test_single_answers_are_no_choices(common: Raw, tiny_rows: Path, tmp_path: Path) -> None:
    data = {"train": str(tiny_rows)}
    with pytest.raises(RecipeError, match="choices between two"):
        run(parse_recipe({**common, "data": data, "method": "reward", "out": str(tmp_path / "run")}))


def test_a_margin_that_is_no_number_names_its_row(common: Raw, choices: Path, tmp_path: Path) -> None:
    raw = {**common, "method": "reward", "preference": {"margin": "gap"}, "out": str(tmp_path / "run")}
    with pytest.raises(TunesmithError, match="no number in the column 'gap'") as caught:
        run(parse_recipe(raw))
    assert f"{choices}:" in str(caught.value)


def test_a_policy_goes_on_with_the_reward_model_that_it_began_with(
    policy: Callable[..., Raw], reward_run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    def dies(*args: Any, **kwargs: Any) -> Any:
        yield from itertools.islice(true_fit(*args, **kwargs), 1)
        raise Killed

    copy = shutil.copytree(reward_run.path, tmp_path / "reward")
    raw = policy("ppo", reward=str(copy))
    with monkeypatch.context() as patched:
        patched.setattr("tunesmith.pipeline.loop.fit", dies)
        with pytest.raises(Killed):
            run(parse_recipe(raw))
    shutil.rmtree(copy / REWARD)
    shutil.copytree(copy / JUDGE, copy / REWARD)  # as after training it again
    with pytest.raises(FolderError, match=r"the file of reward\.by \(reward\) has changed since this run began"):
        run(parse_recipe(raw))


@pytest.mark.parametrize("method", ["dpo", "ppo"])
@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_held_out_prompt_without_room_for_an_answer_is_named(
    policy: Callable[..., Raw], choices: Path, method: str, split: str, tmp_path: Path
) -> None:
    lines = choices.read_text(encoding="utf-8").splitlines(keepends=True)
    files = {"train": "".join(lines[:80]), "valid": "".join(lines[80:100]), "test": "".join(lines[100:])}
    files[split] = json.dumps({"prompt": "x" * 450, "chosen": "a", "rejected": "b"}) + "\n" + files[split]
    for name, text in files.items():
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    data = {name: str(tmp_path / f"{name}.jsonl") for name in files} | {"near_duplicates": 1.0}
    raw = policy(method, data=data, task={"max_new_tokens": 64}, evaluate={"valid_rows": 40})
    with pytest.raises(DataError, match=rf"{split}.jsonl:1: the prompt leaves no room for 64 tokens of answer"):
        run(parse_recipe(raw))


def test_a_policy_run_with_another_reward_is_another_run(policy: Callable[..., Raw], tmp_path: Path) -> None:
    run(parse_recipe(policy("dpo")))
    with pytest.raises(FolderError):
        run(parse_recipe(policy("dpo", reward="")))
