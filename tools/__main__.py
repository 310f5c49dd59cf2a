import argparse, sys
from . import train
p=argparse.ArgumentParser(); s=p.add_subparsers(); q=s.add_parser("train"); train.add_arguments(q); q.set_defaults(run=train.run)
a=p.parse_args(); sys.exit(a.run(a))
