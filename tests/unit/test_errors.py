import errno

import pytest

from vhostcache.errors import Error, ImageError, UsageError, one_line, virtio_status, why, why_number


def test_a_message_says_what_was_found_what_was_expected_and_what_to_do() -> None:
    error = ImageError("image 'a'", "is empty", "some bytes", "fill it")
    assert str(error) == "image 'a': is empty; expected some bytes; fill it"
    assert (error.subject, error.found, error.expected, error.hint) == (
        "image 'a'",
        "is empty",
        "some bytes",
        "fill it",
    )


def test_a_wrong_question_exits_with_two_and_a_world_that_says_no_with_one() -> None:
    assert UsageError("--ram", "found 'x'").exit_status == 2
    assert ImageError("image", "is empty").exit_status == 1


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "a\r", "\udcff", "a\u2028b"])
def test_a_message_is_one_printable_line_whatever_a_file_is_called(name: str) -> None:
    text = str(Error(f"image '{name}'", "is empty"))
    assert text.isprintable()
    assert len(text.splitlines()) == 1
    text.encode()


def test_printable_text_stays_as_it_is() -> None:
    assert one_line("größe 'x' 東京") == "größe 'x' 東京"


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOENT, "does not exist"), (errno.EACCES, "permission denied"), (errno.EHOSTDOWN, "host is down")],
)
def test_an_errno_is_told_in_words(number: int, words: str) -> None:
    assert why(OSError(number, "")) == words
    assert why_number(-number) == words


def test_every_result_has_one_answer_to_the_guest() -> None:
    assert virtio_status(0) == 0
    assert virtio_status(-errno.EIO) == 1
    assert virtio_status(-errno.ENOSPC) == 1
    assert virtio_status(-errno.EOPNOTSUPP) == 2
    assert virtio_status(-errno.ENOSYS) == 2
