import json
import sys
from types import SimpleNamespace

import pytest

from train.metrics import MetricsLog
from wan.errors import WanError


def test_numbers_that_json_has_no_name_for_become_null(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(0, loss=float("inf"), rate=1.0)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 0, "loss": None, "rate": 1.0}


def test_wandb_is_a_mirror_that_is_only_asked_for_by_name(tmp_path, monkeypatch):
    sent = []
    run = SimpleNamespace(define_metric=lambda *a, **k: None, log=sent.append)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **k: run))
    MetricsLog(tmp_path).write(0, loss=1.0)
    assert sent == []
    MetricsLog(tmp_path, wandb_project="x").write(1, loss=2.0)
    assert sent == [{"trainer/step": 1, "loss": 2.0}]


def test_asking_for_wandb_without_it_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(WanError, match="pip install"):
        MetricsLog(tmp_path, wandb_project="x")
