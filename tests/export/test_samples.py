from __future__ import annotations

from sensebatch.export.names import sample_name
from sensebatch.export.samples import _parts


def words(text: str, num_images: int) -> list[str | int]:
    return [
        part["text"] if part["image"] is None else part["image"]
        for part in _parts(text, range(1, 1 + num_images))
    ]


def test_parts_of_a_story_are_its_text_with_images_in_the_place_of_marks() -> None:
    assert words("One.\n<image>\nTwo.\n<image>", 2) == ["One.\n", 1, "\nTwo.\n", 2]
    assert words("<image><image> end", 2) == [1, 2, " end"]


def test_story_with_another_number_of_marks_loses_nothing() -> None:
    assert words("a<image>b<image>c", 1) == ["a", 1, "b<image>c"]
    assert words("a<image>b", 3) == ["a", 1, "b", 2, 3]
    assert words("", 1) == [1]
    assert words("<think>no</think>", 0) == ["<think>no</think>"]


def test_file_names_are_plain_and_say_which_job_it_is() -> None:
    assert sample_name("ships/Dawn 1.png", 17) == "00017-ships-Dawn-1-png"
    assert sample_name("../../etc", 0) == "00000-etc"
    assert sample_name("Müller船", 1) == "00001-Muller"
    assert sample_name("船", 2) == "00002"
    assert len(sample_name("x" * 500, 3)) == 66
