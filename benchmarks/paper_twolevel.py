"""Two-level K-FAC against K-FAC (Koroko et al. 2023) on real data, at a size for two cores: `make paper-twolevel`.

    K-FAC; corrected in five coarse spaces; by Tselepidis et al. 2020; Adam; SGD

Four problems. Every contender chooses its learning rate and damping from one grid, by the loss at the end of short
runs on one seed, and keeps them. Momentum 0.9, Fisher matrices of labels drawn from the model, the whole batch for the
coarse level. Batches and initial weights depend on the seed alone. Losses are means of the batches of an epoch. Equal
epochs: as many steps for all. Equal seconds: what each has reached in the time that K-FAC takes for these, of the
processor and on one thread, so that other work on the machine tells little; Adam and SGD go on until then, for six
times the steps at most.

Written to --out after every run: twolevel.json; a run that is in it is not repeated. At the end: twolevel.md, .png.
"""

from __future__ import annotations

from paper_problems import PROBLEMS
from paper_runs import Study, main
from paper_twolevel_report import write_report
from two_level_runs import CONTENDERS, method

STUDY = Study(
    name="twolevel",
    problems=PROBLEMS,
    contenders=CONTENDERS,
    method=method,
    report=write_report,
)

if __name__ == "__main__":
    main(STUDY, __doc__)
