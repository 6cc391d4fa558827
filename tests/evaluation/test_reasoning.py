import pytest
import torch
from torch.nn import functional as F

from oner_fast.evaluation.boxes import BoxedPicture, Phrase
from oner_fast.evaluation.reasoning import Question, questions, reasoning_figures

BOX = ((0.0, 0.0, 1.0, 1.0),)


def scene(name: str, *phrases: str) -> BoxedPicture:
    return BoxedPicture(name, bytes, tuple(Phrase(text, BOX, text) for text in phrases))


PICTURES = [
    scene("a", "red car", "house"),
    scene("b", "tree", "boat"),  # no name has two words, so that nothing can be hinted at
    scene("c", "red car", "old car"),  # the words of the names are not apart
    scene("d", "blue bird", "tall tower", "10"),
]
NAMES = ["red car", "house", "tree", "boat", "old car", "blue bird", "tall tower", "10"]


def test_questions_hint_at_one_of_two_things() -> None:
    found = questions(PICTURES, NAMES)
    assert [one.picture for one in found] == [0, 3]
    for one in found:
        shown = {phrase.text for phrase in PICTURES[one.picture].phrases}
        asked, other, absent = (NAMES[row] for row in (one.asked, one.other, one.absent))
        assert one.hint in asked.split() and one.hint != asked and other in shown - {asked}
        assert one.absent_hint in absent.split()
        assert not set(absent.split()) & {word for text in shown for word in text.split()}
    assert found == questions(PICTURES, NAMES)
    assert len({questions(PICTURES, NAMES, seed=seed)[1].hint for seed in range(9)}) > 1


def vectors(*rows: list[float]) -> torch.Tensor:
    return F.normalize(torch.tensor(rows, dtype=torch.float32), dim=1)


def test_figures_count_moved_and_spoiled_answers() -> None:
    classes = torch.eye(4)
    asked = [Question(0, 0, 1, 2, "x", "y"), Question(1, 1, 0, 2, "x", "y"), Question(2, 0, 1, 3, "x", "y")]
    image = vectors([0.2, 1, 0, 0], [0, 1, 0.5, 0], [0, 0, 0, 1])  # the other one, the asked one, the absent one
    hint = vectors([1, 0, 0, 0], [1, 0.5, 0, 0], [1, 0, 0, 0])
    far = vectors([0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 1])
    joint = vectors([1, 0.5, 0, 0], [0, 1, 0, 0], [0.5, 0, 0, 1])
    absent_joint = vectors([0, 1, 0.5, 0], [0, 0.5, 1, 0], [0, 0, 0, 1])
    found = reasoning_figures(image, hint, far, joint, absent_joint, classes, asked)
    three = found["three_classes"]
    assert three["image_only"] == pytest.approx(1 / 3) and three["absent_before"] == pytest.approx(1 / 3)
    assert three["joint"] == pytest.approx(2 / 3) and three["text_only"] == pytest.approx(2 / 3)
    assert three["moved"] == {"pictures": 2, "text_only": 1.0, "joint": 0.5, "mean": pytest.approx(0.5)}
    assert three["spoiled"]["pictures"] == 2 and three["spoiled"]["joint"] == 0.5
    assert found["all_classes"]["classes"] == 4 and found["all_classes"]["chance@5"] == 1.0
    assert found["all_classes"]["joint"]["top1"] == pytest.approx(2 / 3)
    same = torch.ones(3, 4)
    flat = reasoning_figures(same, same, same, same, same, torch.ones(4, 4), asked)
    assert flat["three_classes"]["joint"] == 0.0 and flat["all_classes"]["joint"]["top1"] == 0.0
    assert flat["three_classes"]["moved"]["joint"] == 0.0 and flat["three_classes"]["spoiled"]["joint"] is None
