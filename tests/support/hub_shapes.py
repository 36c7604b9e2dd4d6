"""Small copies of datasets on the Hugging Face Hub: the features that their cards or code declare,
with about two rows each, written with `datasets`.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any

import datasets
from datasets import Features, Value

from gvpo_offline.importing.formats import find_format
from gvpo_offline.importing.fragment import Fragment
from gvpo_offline.importing.settings import ImportConfig
from gvpo_offline.importing.sources.inputs import find_sources

Rows = Many[dict[str, Any]]

TEXT, INT, FLOAT, FLAG = Value("string"), Value("int64"), Value("float64"), Value("bool")
TEXTS = datasets.List(TEXT)
MESSAGES = [{"content": TEXT, "role": TEXT}]


def user(text: str) -> dict[str, str]:
    return {"content": text, "role": "user"}


def assistant(text: str) -> dict[str, str]:
    return {"content": text, "role": "assistant"}


def chat(*turns: str) -> list[dict[str, str]]:
    return [(user, assistant)[i % 2](text) for i, text in enumerate(turns)]


def save(folder: Path, features: Features, rows: Rows, kind: str = "arrow") -> Path:
    """Write rows with these features as a saved dataset, a Parquet file or JSON lines."""
    data = datasets.Dataset.from_list(list(rows), features=features)
    if kind == "arrow":
        data.save_to_disk(folder)
        return folder
    path = folder.with_suffix(f".{kind}")
    path.parent.mkdir(parents=True, exist_ok=True)
    data.to_parquet(path) if kind == "parquet" else data.to_json(path)
    return path


def fragments(path: Path, format: str, **settings: Any) -> list[Fragment]:
    """The fragments that a format reads from one input."""
    config = ImportConfig(str(path), "unused", format=format, **settings)
    log_format = find_format(config)
    (source,) = find_sources(str(path))
    return list(log_format.read(source.rows(log_format.columns, lambda _: None), source))


# --- preference, unpaired: what TRL documents, and HuggingFaceH4/ultrafeedback_binarized ----------

PAIR_TEXTS = Features({"prompt": TEXT, "chosen": TEXT, "rejected": TEXT})
PAIR_TEXTS_ALONE = Features({"chosen": TEXT, "rejected": TEXT})
PAIR_MESSAGES = Features({"prompt": MESSAGES, "chosen": MESSAGES, "rejected": MESSAGES})
PAIR_MESSAGES_ALONE = Features({"chosen": MESSAGES, "rejected": MESSAGES})
H4_BINARIZED = Features(
    {
        "prompt": TEXT,
        "prompt_id": TEXT,
        "chosen": MESSAGES,
        "rejected": MESSAGES,
        "messages": MESSAGES,
        "score_chosen": FLOAT,
        "score_rejected": FLOAT,
    }
)
UNPAIRED_TEXTS = Features({"prompt": TEXT, "completion": TEXT, "label": FLAG})
UNPAIRED_MESSAGES = Features({"prompt": MESSAGES, "completion": MESSAGES, "label": FLAG})


def h4_row(prompt: str, chosen: str, rejected: str, scores: tuple[Any, Any]) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "prompt_id": "p",
        "chosen": [user(prompt), assistant(chosen)],
        "rejected": [user(prompt), assistant(rejected)],
        "messages": [user(prompt), assistant(chosen)],
        "score_chosen": scores[0],
        "score_rejected": scores[1],
    }


# --- openbmb/UltraFeedback ------------------------------------------------------------------------

_RATED = {"Rating": TEXT, "Rationale": TEXT}
_TYPED = {"Rating": TEXT, "Rationale": TEXT, "Rationale For Rating": TEXT, "Type": TEXTS}
_COMPLETION = {
    "annotations": {
        "helpfulness": _TYPED,
        "honesty": _RATED,
        "instruction_following": _RATED,
        "truthfulness": _TYPED,
    },
    "critique": TEXT,
    "custom_system_prompt": TEXT,
    "model": TEXT,
    "overall_score": FLOAT,
    "principle": TEXT,
    "response": TEXT,
}
_ULTRAFEEDBACK = {
    "source": TEXT,
    "instruction": TEXT,
    "models": TEXTS,
    "correct_answers": TEXTS,
    "incorrect_answers": TEXTS,
}
ULTRAFEEDBACK = Features(
    {**_ULTRAFEEDBACK, "completions": [{**_COMPLETION, "fine-grained_score": FLOAT}]}
)
ULTRAFEEDBACK_FIRST_RELEASE = Features({**_ULTRAFEEDBACK, "completions": [_COMPLETION]})


def completion(
    model: str, response: str, score: float, ratings: Many[str], mean: float | None = None
) -> dict[str, Any]:
    """A completion; `ratings`: helpfulness, honesty, instruction following, truthfulness."""
    rated = [{"Rating": rating, "Rationale": "because"} for rating in ratings]
    typed = {"Type": ["1"], "Rationale For Rating": "so"}
    made = {
        "annotations": {
            "helpfulness": {**rated[0], **typed},
            "honesty": rated[1],
            "instruction_following": rated[2],
            "truthfulness": {**rated[3], **typed},
        },
        "critique": "Be brief.",
        "custom_system_prompt": "You are helpful.",
        "model": model,
        "overall_score": score,
        "principle": "helpfulness",
        "response": response,
    }
    return made if mean is None else {**made, "fine-grained_score": mean}


def ultrafeedback_row(instruction: str, completions: Rows) -> dict[str, Any]:
    return {
        "source": "evol_instruct",
        "instruction": instruction,
        "models": [made["model"] for made in completions],
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
        "completions": list(completions),
    }


# --- princeton-nlp/*-ultrafeedback-armorm, berkeley-nest/Nectar -----------------------------------

ARMORM = Features(
    {
        "prompt_id": TEXT,
        "prompt": TEXT,
        "all_generated_responses": TEXTS,
        "all_rm_scores": datasets.List(FLOAT),
        "chosen": MESSAGES,
        "rejected": MESSAGES,
    }
)
NECTAR = Features(
    {
        "prompt": TEXT,
        "answers": [{"answer": TEXT, "model": TEXT, "rank": FLOAT}],
        "turns": INT,
        "num_responses": INT,
        "source": TEXTS,
        "good_natured": FLAG,
    }
)


def nectar_row(prompt: str, answers: Many[tuple[str, float | None]]) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "answers": [
            {"answer": text, "model": f"m{i}", "rank": rank}
            for i, (text, rank) in enumerate(answers)
        ],
        "turns": prompt.count("Human:"),
        "num_responses": len(answers),
        "source": ["lmsys-chat-1m"],
        "good_natured": True,
    }


# --- nvidia/HelpSteer2, nvidia/HelpSteer3 ---------------------------------------------------------

ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
HELPSTEER2 = Features({"prompt": TEXT, "response": TEXT, **dict.fromkeys(ATTRIBUTES, INT)})
HELPSTEER3 = Features(
    {
        "domain": TEXT,
        "language": TEXT,
        "context": [{"role": TEXT, "content": TEXT}],
        "response1": TEXT,
        "response2": TEXT,
        "overall_preference": INT,
        "individual_preference": [
            {"score": INT, "reasoning": TEXT, "feedback1": TEXT, "feedback2": TEXT}
        ],
    }
)


def helpsteer2_row(prompt: str, response: str, ratings: Many[int | None]) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "response": response,
        **dict(zip(ATTRIBUTES, ratings, strict=True)),
    }


def helpsteer3_row(preference: int | None, one: str = "one", two: str = "two") -> dict[str, Any]:
    return {
        "domain": "general",
        "language": "english",
        "context": [user("hi"), assistant("hello"), user("which?")],
        "response1": one,
        "response2": two,
        "overall_preference": preference,
        "individual_preference": [
            {"score": preference, "reasoning": "r", "feedback1": "f", "feedback2": "g"}
        ],
    }


# --- open-r1/OpenR1-Math-220k, PrimeIntellect/SYNTHETIC-1 -----------------------------------------

OPENR1 = Features(
    {
        **dict.fromkeys(
            ("problem", "solution", "answer", "problem_type", "question_type", "source", "uuid"),
            TEXT,
        ),
        "is_reasoning_complete": datasets.List(FLAG),
        "generations": TEXTS,
        "correctness_math_verify": datasets.List(FLAG),
        "correctness_llama": datasets.List(FLAG),
        "finish_reasons": TEXTS,
        "correctness_count": INT,
        "messages": MESSAGES,
    }
)
SYNTHETIC1 = Features(
    {
        "response_id": TEXT,
        "problem_id": TEXT,
        "source": TEXT,
        "in_source_id": TEXT,
        "hf_dataset_name": TEXT,
        "task_type": TEXT,
        "prompt": TEXT,
        "gold_standard_solution": TEXT,
        "llm_response": TEXT,
        "verification_info": TEXT,
        "score": FLOAT,
        "verification_result_info": TEXT,
        "metadata": TEXT,
    }
)


def openr1_row(
    generations: Many[str],
    math_verify: Many[bool] | None,
    llama: Many[bool | None] | None = None,
    finish: Many[str | None] | None = None,
) -> dict[str, Any]:
    return {
        **dict.fromkeys(
            ("solution", "problem_type", "question_type", "source", "uuid"), "synthetic_math"
        ),
        "problem": "2 + 3?",
        "answer": "5",
        "is_reasoning_complete": [True] * len(generations),
        "generations": list(generations),
        "correctness_math_verify": math_verify,
        "correctness_llama": llama,
        "finish_reasons": finish,
        "correctness_count": 1,
        "messages": [user("2 + 3?"), assistant(generations[0])],
    }


def synthetic1_row(problem: str, response: str, score: float | None) -> dict[str, Any]:
    return {
        **dict.fromkeys(SYNTHETIC1, "{}"),
        "problem_id": problem,
        "response_id": f"{problem}_{response}",
        "prompt": f"Solve {problem}.",
        "llm_response": response,
        "score": score,
    }


# --- distilabel, lmarena-ai/arena-human-preference-55k --------------------------------------------


def distilabel(ratings: Value, models: str = "generation_models") -> Features:
    """The features of a distilabel dataset; ratings are integers or text, by version."""
    return Features(
        {
            "instruction": TEXT,
            "generations": TEXTS,
            models: TEXTS,
            "ratings": datasets.List(ratings),
            "rationales": TEXTS,
            "ultrafeedback_model": TEXT,
        }
    )


def distilabel_row(
    ratings: Many[Any] | None,
    generations: Many[str | None] = ("a", "b", "c"),
    models: str = "generation_models",
) -> dict[str, Any]:
    return {
        "instruction": "Say cat",
        "generations": list(generations),
        models: [f"m{i}" for i in range(len(generations))],
        "ratings": ratings,
        "rationales": None,
        "ultrafeedback_model": "gpt-4",
    }


ARENA = Features(
    {
        "id": INT,
        **dict.fromkeys(("model_a", "model_b", "prompt", "response_a", "response_b"), TEXT),
        **dict.fromkeys(("winner_model_a", "winner_model_b", "winner_tie"), INT),
    }
)


def arena_row(
    battle: int, prompt: str, a: str, b: str, votes: tuple[int, int, int]
) -> dict[str, Any]:
    """A battle; prompt and answers are JSON strings, as in the original file."""
    return {
        "id": battle,
        "model_a": "gpt-4",
        "model_b": "vicuna",
        "prompt": prompt,
        "response_a": a,
        "response_b": b,
        **dict(zip(("winner_model_a", "winner_model_b", "winner_tie"), votes, strict=True)),
    }


# --- one of each ----------------------------------------------------------------------------------

WHOLE: dict[str, tuple[Features, list[dict[str, Any]], int]] = {
    "arena": (
        ARENA,
        [arena_row(3, '["hi","more"]', '["a1","a2"]', '["b1","b2"]', (0, 1, 0))],
        0,
    ),
    "armorm": (
        ARMORM,
        [
            {
                "prompt_id": "x",
                "prompt": "q",
                "all_generated_responses": ["a", "b"],
                "all_rm_scores": [0.5, 0.25],
                "chosen": chat("q", "a"),
                "rejected": chat("q", "b"),
            }
        ],
        1,
    ),
    "distilabel": (distilabel(TEXT), [distilabel_row(["1", "2", "3"])], 1),
    "helpsteer2": (
        HELPSTEER2,
        [helpsteer2_row("c#", answer, (3, 4, 4, 2, 1)) for answer in "ab"],
        1,
    ),
    "helpsteer3": (HELPSTEER3, [helpsteer3_row(-1), helpsteer3_row(2, "x")], 2),
    "nectar": (
        NECTAR,
        [nectar_row("\n\nHuman: q\n\nAssistant: ", [("a", 1.0), ("b", 2.0)])],
        1,
    ),
    "openr1_math": (OPENR1, [openr1_row(["5", "6"], [True, False])], 1),
    "preference": (
        PAIR_MESSAGES_ALONE,
        [{"chosen": chat("q", "a"), "rejected": chat("q", "b")}],
        1,
    ),
    "synthetic1": (
        SYNTHETIC1,
        [synthetic1_row(p, r, 0.5) for p in ("p1", "p2") for r in "ab"],
        2,
    ),
    "ultrafeedback": (
        ULTRAFEEDBACK,
        [
            ultrafeedback_row(
                "q", [completion(m, m, 5.0, "1234", 2.5) for m in ("a", "b", "c", "d")]
            )
        ],
        1,
    ),
    "unpaired": (
        UNPAIRED_MESSAGES,
        [{"prompt": chat("q"), "completion": [assistant(t)], "label": t == "a"} for t in "ab"],
        1,
    ),
}
"""By format: features, rows that make whole groups but for the arena's, and how many groups."""
