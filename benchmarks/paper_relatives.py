"""K-FAC's relatives on real data, at a size for one core: `make paper-relatives`.

    K-FAC; EKFAC; TKFAC; KPSVD; deflation; mini-block Fisher, linear layers with one block for all neurons; K-BFGS;
    Adam; SGD

The MNIST autoencoder and a convolutional network on CIFAR-10. Every contender chooses its learning rate and damping
from one grid, by the loss at the end of short runs on one seed, and keeps them. Momentum 0.9, Fisher matrices of labels
drawn from the model (K-BFGS needs none). Batches and initial weights depend on the seed alone. Losses are means of the
batches of an epoch. Equal epochs: as many steps for all. Equal seconds: what each has reached in the time that K-FAC
takes for these, of the processor and on one thread; Adam and SGD go on until then, for six times the steps at most. The
size: as many steps as leave the whole within half an hour.

Written to --out after every run: relatives.json; a run that is in it, or in a file of --merge, is not repeated. At the
end: relatives.md, .png. Problems may run in processes of their own, and be put together at the end:

    python benchmarks/paper_relatives.py --problems mnist --out runs/mnist
    python benchmarks/paper_relatives.py --problems cifar10 --out runs/cifar10
    python benchmarks/paper_relatives.py --merge runs/mnist/relatives.json runs/cifar10/relatives.json
"""

from __future__ import annotations

from paper_problems import PROBLEMS
from paper_relatives_report import write_report
from paper_runs import Study, main
from relatives_runs import CONTENDERS, method

STUDY = Study(
    name="relatives",
    problems={name: PROBLEMS[name] for name in ("mnist", "cifar10")},
    contenders=CONTENDERS,
    method=method,
    report=write_report,
)

if __name__ == "__main__":
    main(STUDY, __doc__)
