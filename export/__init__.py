"""The workstation: a torch module or an ONNX file becomes a bundle."""
