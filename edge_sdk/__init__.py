"""The ground floor, which runs on the device: predict, record, train one task, publish a small update."""
