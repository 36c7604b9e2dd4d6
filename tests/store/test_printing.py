"""How datasets, groups and losses print."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from support.builders import build_dataset, make_group

import gvpo_offline
from gvpo_offline.group import Group
from gvpo_offline.store.dataset import open_dataset

HOSTILE = '<script>alert("x")</script>\x1b[31m\u202e'


class Cells(HTMLParser):
    """The texts of the cells, and the names of all elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.elements: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.elements.add(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_a_dataset_prints_what_it_holds(tmp_path: Path) -> None:
    """The mean is over the first row group alone, and says so."""
    dataset = build_dataset(tmp_path / "data", 24)
    groups = [group for i in range(dataset.n_row_groups) for group in dataset.groups(i)]
    first = np.concatenate([group.rewards for group in dataset.groups(0)])
    responses = sum(group.group_size for group in groups)
    parts = [line.strip().split(" ", 1) for line in repr(dataset).splitlines()[1:]]
    lines = {name: text.strip() for name, text in parts}
    assert repr(dataset).splitlines()[0] == f"GroupDataset({str(tmp_path / 'data')!r}, version=1)"
    assert lines["groups"] == "24"
    assert lines["responses"] == f"{responses:,} ({responses / 24:.3g} a group)"
    assert lines["tokens"] == f"{sum(group.n_tokens for group in groups):,}"
    assert lines["rewards"] == (
        f"reward@1: mean {first.mean():.4g}, {first.min():.4g} to {first.max():.4g}, "
        f"in the first {len(dataset.groups(0))} groups"
    )
    assert lines["reference"].endswith(", made-up")
    assert repr(pickle.loads(pickle.dumps(dataset))) == repr(dataset)
    cells = Cells(dataset._repr_html_())
    assert lines["rewards"] in cells.texts
    assert cells.elements == {"div", "code", "table", "tr", "th", "td"}


def test_what_is_not_joined_or_cannot_be_read_raises_nothing(tmp_path: Path) -> None:
    build_dataset(tmp_path / "data", 8)
    alone = open_dataset(tmp_path / "data", join=())
    assert "rewards    none joined, of reward@1" in repr(alone)
    assert "reference  none joined, of " in repr(alone)
    whole = open_dataset(tmp_path / "data")
    for path in (tmp_path / "data" / "rewards").rglob("*.parquet"):
        path.write_bytes(b"damaged")
    assert "rewards    reward@1\n" in repr(whole)


def test_a_group_prints_ids_and_how_to_see_texts(tmp_path: Path) -> None:
    whole = make_group(0, k=3, prompt_tokens=12)
    group = replace(whole, prompt=None, messages=None, responses=None)
    text = repr(group)
    ids = " ".join(map(str, group.prompt_token_ids[:8].tolist()))
    assert f"  prompt      ids {ids} …" in text
    assert text.splitlines()[0] == (
        f"Group({group.group_id!r}, 3 responses, {group.n_tokens} tokens)"
    )
    assert group.rewards is not None
    for i, line in enumerate(text.splitlines()[2:5]):
        length = len(group.response_token_ids[i])
        assert line.startswith(
            f"  response {i}  reward {group.rewards[i]:.4g}, {group.samplers[i]}, {length} tokens"
        )
    assert "tokenizer.decode(group.response_token_ids[0])" in text
    assert "tokenizer.decode" in Cells(group._repr_html_()).texts[-1]


def test_a_group_with_texts_prints_them_and_is_bounded(tmp_path: Path) -> None:
    group = make_group(0, k=5)
    texts = ("short", "x" * 5000, *("line\nline",) * 3)
    shown = replace(group, prompt="What?", responses=texts)
    assert "prompt      What?" in repr(shown)
    assert ": short\n" in repr(shown)
    assert "line line" in repr(shown)
    assert "tokenizer.decode" not in repr(shown)
    assert max(map(len, repr(shown).splitlines())) < 200
    chat = replace(group, prompt=None, messages='[{"role": "user", "content": "Hello"}]')
    assert "prompt      user: Hello" in repr(chat)
    assert "user: Hello" in Cells(chat._repr_html_()).texts
    many = make_group(1, k=2)
    rows = 200
    large = Group(
        "g",
        many.prompt_token_ids,
        many.response_token_ids[:1] * rows,
        ("s",) * rows,
        (False,) * rows,
        rewards=np.zeros(rows),
    )
    assert len(repr(large).splitlines()) == 14
    assert "and 190 more responses" in repr(large)


def test_hostile_texts_are_neither_markup_nor_control(tmp_path: Path) -> None:
    group = replace(
        make_group(0, k=2),
        group_id=HOSTILE,
        prompt=HOSTILE,
        samplers=(HOSTILE, HOSTILE),
        responses=(HOSTILE, HOSTILE),
    )
    dataset = build_dataset(tmp_path / "<b>data", 4)
    for text in (repr(group), group._repr_html_(), repr(dataset), dataset._repr_html_()):
        assert "\x1b" not in text
        assert "\u202e" not in text
    for html in (group._repr_html_(), dataset._repr_html_()):
        assert Cells(html).elements <= {"div", "code", "table", "tr", "th", "td", "small", "br"}


def test_a_loss_prints_its_numbers() -> None:
    """l = lp - ref = (1/2, -1/2) and (-1, 1), R = (1, 0) twice, beta 1/10: the residuals R - beta l
    centred are +-(1/2 - 1/20) and +-(1/2 + 1/10); explained variance is
    1 - (2 * 0.45^2 + 2 * 0.6^2) / (4 * 0.5^2) = -0.125, the loss by k - 1 = 1 a group
    (0.405 + 0.72) / 2 / 2 = 0.28125. One of the two pairs is ordered as its rewards.
    """
    lp = torch.tensor([-1.0, -2.0, -3.0, -1.0], requires_grad=True)
    ref = torch.tensor([-1.5, -1.5, -2.0, -2.0])
    rewards, index = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([0, 0, 1, 1])
    loss = gvpo_offline.gvpo_loss(lp, ref, rewards, index, beta=0.1)
    lines = repr(loss).splitlines()
    assert lines[0] == "GroupLoss(0.28125, with a gradient: 2 groups, 4 responses, beta 0.1)"
    figures = dict(line.split() for line in lines[1:-1])
    assert figures["explained_variance"] == "-0.125"
    assert figures["pair_accuracy"] == "0.5"
    # The best of the groups have 1/2 and -1.
    assert float(figures["best_log_ratio_mean"]) == pytest.approx(-0.25)
    with torch.no_grad():
        assert "gradient" not in repr(
            gvpo_offline.gvpo_loss(lp.detach(), ref, rewards, index, beta=0.1)
        )


def test_printing_a_dataset_and_a_group_loads_no_torch(tmp_path: Path) -> None:
    build_dataset(tmp_path, 4)
    script = (
        f"import sys, gvpo_offline; d = gvpo_offline.open_dataset({str(tmp_path)!r}); "
        "print(d, d.groups(0)[0], d._repr_html_(), d.groups(0)[0]._repr_html_()); "
        "assert not {'torch', 'transformers', 'polars'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
