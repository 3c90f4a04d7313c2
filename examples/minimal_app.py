"""The smallest app that embeds Edgewise: it predicts, keeps what was labelled, and learns when the gateway asks.

Run it with `python examples/minimal_app.py device.toml windows.npy labels.npy`; the two files stand for a sensor and for
somebody who knows better now and then.
"""

import sys

import numpy as np

from edge_sdk import EdgeDevice

windows, labels = np.load(sys.argv[2]), np.load(sys.argv[3])

with EdgeDevice.open(sys.argv[1], on_event=print) as device:  # device.toml, made by `edgewise devices add`
    device.start()  # from now on it trains in the background whenever the gateway asks
    for window, label in zip(windows, labels, strict=True):
        scores = device.predict(window)  # always the newest model that this device has
        device.record(window, label)  # never leaves this device
        print(f"predicted {scores.argmax()}, was {label}", flush=True)
    sys.stdin.read()  # your app goes on; here: until its input ends
