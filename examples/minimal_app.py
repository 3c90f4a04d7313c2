"""The smallest app that embeds Edgewise: it predicts, keeps what was labelled, and learns when the gateway asks.

Run it with `python examples/minimal_app.py device.toml windows.npy labels.npy`; the two files stand for a sensor and for
somebody who knows better now and then.
"""

import sys

import numpy as np

from edge_sdk import EdgeDevice, EdgewiseError

if len(sys.argv) != 4:
    sys.exit("usage: python minimal_app.py device.toml windows.npy labels.npy")
_, config, windows_file, labels_file = sys.argv
try:
    windows, labels = np.load(windows_file), np.load(labels_file)
    with EdgeDevice.open(config, on_event=print) as device:  # device.toml, made by `edgewise devices add`
        device.start()  # from now on it trains in the background whenever the gateway asks
        for window, label in zip(windows, labels, strict=False):
            scores = device.predict(window)  # always the newest model that this device has
            print(f"predicted {scores.argmax()}, was {label}", flush=True)
        if not device.has_recording(windows_file):  # all of it or none is stored, so a restart stores nothing twice
            device.record_many(windows, labels, recording=windows_file)  # never leaves this device
        sys.stdin.read()  # your app goes on; here: until its input ends
except (EdgewiseError, OSError) as error:
    sys.exit(f"error: {error}")
