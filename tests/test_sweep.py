"""All methods side by side: the same network, the same budget of macs, the same fine-tuning."""

import pandas as pd
from conftest import execute

from prune_nb.criteria.core import METHODS


def test_all_methods_at_equal_macs(tmp_path):
    path = tmp_path / "table.csv"
    quick = dict(model="resnet20x0.5", train_size=512, pretrain_epochs=3, epochs=1, samples=128)
    quick["refit"] = False
    done = execute(tmp_path, "sweep", methods="all", of="macs", ratio=0.4, table=path, **quick)
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(path).set_index("method")
    assert list(table.index) == list(METHODS)
    assert table.refused.isna().all(), table.refused
    macs = table["macs"] / table.macs.max()
    assert macs.min() > 0.96
    assert table["baseline accuracy"].nunique() == 1
    lost = table["baseline accuracy"] - table["pruned accuracy"]
    assert lost["curvature_tucker"] < lost["random"]
    assert table["finetuned accuracy"].median() > table["pruned accuracy"].median()
