"All methods side by side: the same network, the same budget of multiply-accumulates, the same fine-tuning."

import pandas as pd
from conftest import execute

from prune_nb.criteria.core import METHODS


def test_all_methods_at_equal_macs(tmp_path):
    done = execute(
        tmp_path,
        "sweep",
        methods="all",
        of="macs",
        ratio=0.4,
        model="resnet20x0.5",
        train_size=512,
        pretrain_epochs=3,
        epochs=1,
        samples=128,
        table=tmp_path / "table.csv",
    )
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "table.csv").set_index("method")
    assert list(table.index) == list(METHODS) and table.refused.isna().all(), table.refused
    macs = table["macs"] / table.macs.max()
    assert macs.min() > 0.96 and table["baseline accuracy"].nunique() == 1
    fell = table["baseline accuracy"] - table["pruned accuracy"]
    assert (
        fell["curvature_tucker"] < fell["random"]
        and table["finetuned accuracy"].median() > table["pruned accuracy"].median()
    )
