"""Files as targets: checkpoints, ONNX graphs, exported programs; nothing is unpickled."""
