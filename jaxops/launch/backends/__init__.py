"""The table of backends, by name: each is one module here that holds one value `BACKEND`; table.py lists them.

There are three sorts of backends, and nothing outside of this folder asks for more than the sort.

* **Driven** (`local`, `ssh`, `queued-resources`): the launcher reaches the hosts and runs every stage there itself
  (jaxops/launch/engine.py, stages.py). A driven backend gives the hosts; one that makes its machines also creates them.
* **Rendered** (`sky`, `ray`): files and commands for another tool are printed, and nothing is run.
* **Scheduler** (`slurm`, `mig`, `gke`): the cluster starts the workers, nobody reaches a host, and a worker does all
  stages by itself with `launch/start_worker.sh` (jaxops/launch/scheduled.py is their engine). A scheduler gives the
  files and commands of a submission, and says what became of it.

What a scheduler's worker finds, all of it below the folder of runs, which is shared or an object store:

* `run.dir/code/SHA256.tar`: the code, as for driven backends.
* `run.dir/.launch/ID/host-SHA256.tar`: `start_worker.sh`, `attend_worker.py`, `setup_host.sh`, and `worker.json`, which
  says what is to be run, under which rules. It holds no secret: only where a worker finds its secrets.
* `run.dir/.launch/ID/attempt-N/worker-R.log`, `.beat` (a heartbeat, JSON) and `.json` (how it ended): by the worker.
* `run.dir/.launch/ID/stop`: the wish that nobody tries again.

A worker is `sh start_worker.sh` with the variables of `Job.settings()`, and LAUNCH_WORKER (its number) and
LAUNCH_ATTEMPT from the cluster. It ends with the documented statuses: 0, 1, 2, 75 (saved) and 76 (lost). Where the
cluster tries again by itself (`tries_again`), it does so after 75, 76 and signals, never after 1 and 2, and at most
`record.retries` times; else the engine removes what is left and submits the next attempt.

Every call is safe to repeat. `submit` adopts what is there under the launch's name and label, and makes nothing twice;
`remove` finds by the label what a killed launcher has left. Names that reach a command are validated in `problems`.
Options of one backend are `--option KEY=VALUE`, of the keys that it lists; they stand in `spec.options`.
"""
