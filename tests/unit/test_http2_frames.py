"""Frames on the wire, held against hyperframe, and the settings and padding that are refused."""

import pytest
from hyperframe.frame import Frame, GoAwayFrame, PingFrame, RstStreamFrame, SettingsFrame, WindowUpdateFrame

from headrace.http2 import frames
from headrace.http2.frames import ConnectionFault, ErrorCode, Setting
from headrace.http2.patience import Patience


def _read(data: bytes) -> Frame:
    """A frame as another implementation reads it."""
    frame, length = Frame.parse_frame_header(memoryview(data[:9]))
    assert length == len(data) - 9
    frame.parse_body(memoryview(data[9:]))
    return frame


def test_frames_read_as_they_are_meant():
    settings = _read(frames.settings([(Setting.MAX_FRAME_SIZE, 2**20), (Setting.INITIAL_WINDOW_SIZE, 5)]))
    assert isinstance(settings, SettingsFrame)
    assert settings.settings == {5: 2**20, 4: 5}
    ping = _read(frames.ping(b"12345678", frames.ACK))
    assert isinstance(ping, PingFrame)
    assert (ping.opaque_data, set(ping.flags)) == (b"12345678", {"ACK"})
    goaway = _read(frames.goaway(2**31 - 1, ErrorCode.ENHANCE_YOUR_CALM, "enough"))
    assert isinstance(goaway, GoAwayFrame)
    assert (goaway.last_stream_id, goaway.error_code, goaway.additional_data) == (2**31 - 1, 11, b"enough")
    reset = _read(frames.rst_stream(2**31 - 1, ErrorCode.CANCEL))
    assert isinstance(reset, RstStreamFrame)
    assert (reset.stream_id, reset.error_code) == (2**31 - 1, 8)
    update = _read(frames.window_update(7, 2**31 - 1))
    assert isinstance(update, WindowUpdateFrame)
    assert (update.stream_id, update.window_increment) == (7, 2**31 - 1)


@pytest.mark.parametrize("length", [0, 1, 2**16 - 1, 2**16, 2**24 - 1])
def test_a_header_is_read_as_it_was_written(length):
    high, low, kind, flags, stream = frames.read_header(frames.header(length, 3, 0x25, 2**31 - 1), 0)
    assert (high << 16 | low, kind, flags, stream) == (length, 3, 0x25, 2**31 - 1)


def test_the_last_of_equal_settings_counts_and_unknown_ones_are_no_fault():
    payload = frames.settings([(Setting.INITIAL_WINDOW_SIZE, 1), (Setting.INITIAL_WINDOW_SIZE, 2)])[9:]
    assert frames.read_settings(payload + b"\x00\x99\x00\x00\x00\x07") == {4: 2, 0x99: 7}
    assert frames.read_settings(b"") == {}


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b"\0\4\0\0\0", ErrorCode.FRAME_SIZE_ERROR),
        (b"\0\4\x80\0\0\0", ErrorCode.FLOW_CONTROL_ERROR),
        (b"\0\5\0\0\x3f\xff", ErrorCode.PROTOCOL_ERROR),
        (b"\0\5\1\0\0\0", ErrorCode.PROTOCOL_ERROR),
        (b"\0\2\0\0\0\2", ErrorCode.PROTOCOL_ERROR),
        (b"\0\4\x80\0\0\0" + b"\0\4\0\0\0\1", ErrorCode.FLOW_CONTROL_ERROR),
    ],
)
def test_settings_that_cannot_be(payload, code):
    with pytest.raises(ConnectionFault) as caught:
        frames.read_settings(payload)
    assert caught.value.code is code


@pytest.mark.parametrize(
    ("payload", "flags", "rest"),
    [
        (b"\x02abcde", frames.PADDED, b"abc"),
        (b"\x00abc", frames.PADDED, b"abc"),
        (b"\x03abc", frames.PADDED, b""),
        (b"pppppabc", frames.WITH_PRIORITY, b"abc"),
        (b"\x01pppppabc", frames.WITH_PRIORITY | frames.PADDED, b"ab"),
    ],
)
def test_padding_and_priority_are_taken_off(payload, flags, rest):
    assert frames.unpadded(payload, flags, with_priority=True) == rest


@pytest.mark.parametrize(
    ("payload", "flags"),
    [
        (b"", frames.PADDED),
        (b"\x04abc", frames.PADDED),
        (b"pppp", frames.WITH_PRIORITY),
        (b"\x01ppppp", frames.WITH_PRIORITY | frames.PADDED),
    ],
)
def test_more_padding_than_there_is_room_for(payload, flags):
    with pytest.raises(ConnectionFault):
        frames.unpadded(payload, flags, with_priority=True)


def test_the_highest_bit_of_an_increment_means_nothing():
    assert frames.read_increment(b"\x80\0\0\x05") == 5
    with pytest.raises(ConnectionFault):
        frames.read_increment(b"\0\0\5")


def test_patience_comes_back_with_time_and_not_without_end():
    patience = Patience(10, 2, 100.0)
    assert all(patience.bears(1, 100.0) for _ in range(10))
    assert not patience.bears(1, 100.0)
    assert patience.bears(2, 101.5)
    assert patience.bears(10, 1000.0)
    assert not patience.bears(1, 1000.0)
