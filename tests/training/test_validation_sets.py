"""Several validation sets: each loss by its name, the main one by their shares, the same on every mesh."""

import pytest

from raytron.config import from_mapping
from raytron.data.run_data import ValidationSet
from raytron.parallel.mesh import Mesh
from raytron.plan.mesh import MeshShape
from raytron.plan.plan import make_plan
from raytron.testing.streams import RandomStream
from raytron.training.trainer import Trainer

CONFIG = from_mapping(
    {"model": {"layers": 1, "hidden": 16, "heads": 2, "ffn": 16, "vocab": 31}, "sequence_length": 8, "steps": 2,
     "global_batch_size": 4, "micro_batch_size": 1, "evaluate": {"batches": 2}, "data": {"dataset": "random"}}
)  # fmt: skip
SETS = [ValidationSet("web", RandomStream(31, 8, 1), 0.75), ValidationSet("code", RandomStream(31, 8, 2), 0.25)]


def trainer(validation, rank=0, **changes):
    config = CONFIG.replace(**changes)
    return Trainer(make_plan(config, None), Mesh(MeshShape.of(config.mesh), rank), RandomStream(31, 8), validation)


def trained(rank, changes):
    made = trainer(SETS, rank, **changes)
    for _ in range(2):
        made.train_step()
    return made.evaluate()


def test_each_set_has_the_loss_that_it_has_alone():
    record = trainer(SETS).evaluate()
    alone = {each.name: trainer(each.stream).evaluate() for each in SETS}
    assert record["validation_loss/web"] == alone["web"]["validation_loss"]
    assert record["validation_loss/code"] == alone["code"]["validation_loss"]
    assert record["validation_loss/web"] != record["validation_loss/code"]
    main = 0.75 * record["validation_loss/web"] + 0.25 * record["validation_loss/code"]
    assert record["validation_loss"] == pytest.approx(main, rel=1e-12)
    assert record["tokens"] == 2 * 2 * 4 * 8


def test_one_set_without_a_name_is_told_as_the_main_loss_alone():
    assert set(trainer(SETS[0].stream).evaluate()) == {"step", "validation_loss", "tokens"}
    named = {"data.validation": [{"name": "web", "dataset": "random"}]}
    record = trainer([SETS[0]._replace(share=1.0)], **named).evaluate()
    assert record["validation_loss/web"] == record["validation_loss"]


def test_a_set_of_no_share_is_told_and_does_not_count():
    first, second = SETS
    record = trainer([first._replace(share=1.0), second._replace(share=0.0)]).evaluate()
    assert record["validation_loss"] == record["validation_loss/web"]
    assert record["validation_loss/code"] > 0


def test_the_losses_are_those_of_every_mesh(world):
    (alone,) = world.run(1, trained, {})
    for changes, ranks in (({"mesh.dp": 3}, 3), ({"mesh.dp": 2, "mesh.tp": 2}, 4)):
        for record in world.run(ranks, trained, changes):
            assert record == pytest.approx(alone, rel=1e-5)
