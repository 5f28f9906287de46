"""A wire between the network devices that two names give it: ends of a wire that delays frames and loses some.

It makes the devices, prints "ready", and carries frames from the first line of stdin on. Each line "SECONDS SHARE" is
the delay from then on, in each direction, and the share of the frames that are lost. The kernel's netem does this too,
but many kernels lack it.
"""
import contextlib
import fcntl
import os
import queue
import random
import struct
import sys
import threading
import time

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 2, 0x1000
LONGEST_FRAME = 2**16
state = {"delay": 0.0, "loss": 0.0}


def make_device(name):
    """The file descriptor through which the frames of a new network device are read and written."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return descriptor


def take_frames(source, frames, rng):
    while True:
        frame = os.read(source, LONGEST_FRAME)
        if rng.random() >= state["loss"]:
            frames.put((time.monotonic() + state["delay"], frame))


def hand_on_frames(frames, target):
    while True:
        due, frame = frames.get()
        time.sleep(max(due - time.monotonic(), 0))
        with contextlib.suppress(OSError):  # the device is down
            os.write(target, frame)


ends = [make_device(name) for name in sys.argv[1:3]]
print("ready", flush=True)
for number, line in enumerate(sys.stdin):
    state["delay"], state["loss"] = map(float, line.split())
    if number == 0:
        for source, target in (ends, ends[::-1]):
            frames = queue.Queue()
            threading.Thread(target=take_frames, args=(source, frames, random.Random(source)), daemon=True).start()
            threading.Thread(target=hand_on_frames, args=(frames, target), daemon=True).start()
