"""INT8 by tfquant against INT8 by other tools: what scripts/bench_peers and examples/resnet50.py --peers are made of."""
