"""A gcloud for tests: it knows what google.md says, keeps its resources in a folder, and runs workers as processes.

FAKE_GCLOUD names the folder. `calls` there is what was called; `hosts` is how many VMs can be had (default: all);
`refuse` is the name of a refusal of google.md. `preempt` is done by the function of that name.
"""

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("google.md")
WIDE = ("--project", "--format", "--quiet")


def tables() -> dict[str, list[list[str]]]:
    """The tables of google.md by their heading: the cells of each row."""
    found: dict[str, list[list[str]]] = {}
    heading = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            heading = line[3:]
        elif line.startswith("| ") and not line.startswith("| ---"):
            found.setdefault(heading, []).append([cell.strip() for cell in line.strip("|").split(" | ")])
    return {heading: rows[1:] for heading, rows in found.items()}


def known_flags() -> dict[str, dict[str, str]]:
    """The flags of each command, with the track of gcloud 528 that knows them."""
    found: dict[str, dict[str, str]] = {}
    for command, flag, track, *_ in tables()["Commands and flags"]:
        found.setdefault(command, {})
        if flag:
            found[command][flag] = track
    return found


def parse(argv: list[str]) -> tuple[str, list[str], dict[str, str]]:
    """Splits a call into command, names and flags.

    Raises:
      ValueError: google.md has no such command or flag.
    """
    words = [word for word in argv if word != "alpha"]
    flags = {word.partition("=")[0]: word.partition("=")[2] for word in words if word.startswith("--")}
    plain = [word for word in words if not word.startswith("--")]
    known = known_flags()
    for length in range(len(plain), 0, -1):
        command = " ".join(plain[:length])
        if command in known:
            unknown = [flag for flag in flags if flag not in known[command] and flag not in WIDE]
            if unknown:
                raise ValueError(f"unrecognized arguments: {' '.join(unknown)}")
            return command, plain[length:], flags
    raise ValueError(f"Invalid choice: {' '.join(plain)!r}")


class Cloud:
    """The resources of the fake, in one folder, changed by one call at a time."""

    def __init__(self, home: Path):
        self.home = home

    @contextlib.contextmanager
    def held(self):
        self.home.mkdir(parents=True, exist_ok=True)
        with open(self.home / "lock", "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            path = self.home / "state.json"
            state: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
            for kind in ("policies", "templates", "groups", "queued"):
                state.setdefault(kind, {})
            yield state
            (self.home / "new").write_text(json.dumps(state))
            os.replace(self.home / "new", path)

    def look(self) -> dict[str, Any]:
        with self.held() as state:
            return json.loads(json.dumps(state))

    def calls(self) -> list[list[str]]:
        path = self.home / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def preempt(self, worker: int = 0) -> None:
        """Google takes one VM of the newest group, or the node of a queued resource, away."""
        with self.held() as state:
            for group in state["groups"].values():
                if worker < len(group["vms"]):
                    _kill(group["vms"][worker])
                    group["vms"][worker]["status"] = "TERMINATED"
            for one in state["queued"].values():
                if one["state"] == "ACTIVE":
                    one["state"] = "SUSPENDED"
                    for host in range(16):
                        _kill_under(self.home / f"node-{host}")


def _kill(vm: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        os.killpg(vm["pid"], signal.SIGKILL)
    _kill_under(Path(vm["home"]))


def _kill_under(home: Path) -> None:
    """Ends every process that has its home there, as a VM's end does."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"HOME={home}".encode() in path.read_bytes().split(b"\0"):
                os.kill(int(path.parent.name), signal.SIGKILL)


def boot(home: Path, worker: int, startup: str) -> dict[str, Any]:
    """Starts a VM: a process group of its own, with a home of its own, in which the startup script runs."""
    home.mkdir(parents=True, exist_ok=True)
    (home / "startup.sh").write_text(startup)
    env = {name: os.environ[name] for name in ("PATH", "FAKE_GCLOUD")}
    env |= {"HOME": str(home), "LAUNCH_WORK": str(home / "work"), "LAUNCH_WORKER": str(worker)}
    env["LAUNCH_ADDRESS"] = "127.0.0.1"
    with open(home / "serial", "wb") as serial:
        process = subprocess.Popen(
            ["sh", str(home / "startup.sh")],
            cwd=home, env=env, stdin=subprocess.DEVNULL, stdout=serial, stderr=serial, start_new_session=True,
        )  # fmt: skip
    return {"home": str(home), "pid": process.pid, "status": "RUNNING"}


class Refused(Exception):
    """A refusal: its status and its text."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


def refusal(name: str, **values: str) -> Refused:
    row = next(row for row in tables()["Refusals"] if row[0] == name)
    text = row[1]
    for key, value in values.items():
        text = text.replace(key, value)
    return Refused(int(row[2]), text)


def answer(cloud: Cloud, argv: list[str]) -> Any:
    """Does what a call asks for, and returns what it prints."""
    try:
        command, names, flags = parse(argv)
    except ValueError as error:
        raise Refused(2, str(error)) from None
    if (cloud.home / "refuse").exists():
        raise refusal((cloud.home / "refuse").read_text())
    if command == "secrets versions access":
        return (cloud.home / "secrets" / flags["--secret"]).read_text()
    if command == "storage cp":
        source, target = [str(cloud.home / "bucket") + name[4:] if name.startswith("gs://") else name for name in names]
        if not Path(source).exists():
            raise Refused(1, "The following URLs matched no objects or files")
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).write_bytes(Path(source).read_bytes())
        return ""
    if flags["--project"] == "bogus-project":
        raise refusal("project")
    if (flags.get("--zone") or "us-east5-b") == "no-such1-a":
        raise refusal("zone")
    if command == "compute tpus tpu-vm ssh":
        return ssh(cloud, names[0], int(flags["--worker"]), flags["--command"])
    with cloud.held() as state:
        if "queued-resources" in command or "tpu-vm" in command:
            return queued(cloud, state, command, names, flags)
        return groups(cloud, state, command, names, flags)


def groups(cloud: Cloud, state: dict[str, Any], command: str, names: list[str], flags: dict[str, str]) -> Any:
    """Policies, templates and groups."""
    kinds = {"resource-policies": "policies", "instance-templates": "templates", "managed": "groups"}
    words = command.split()
    kind = next(kinds[word] for word in words if word in kinds)
    verb = "create" if "create" in words else words[-1]
    table, name = state[kind], names[0] if names else ""
    if verb == "list":
        pattern = flags["--filter"].removeprefix("name~")
        return [{"name": one} for one in table if re.search(pattern, one)]
    if verb == "create":
        if name in table:
            raise refusal("exists", NAME=name)
        return make(state, kind, name, flags)
    if name not in table:
        raise refusal("absent", NAME=name)
    if verb == "describe":
        return {"name": name}
    if verb == "delete":
        if kind == "policies" and any(group["policy"].endswith(f"/{name}") for group in state["groups"].values()):
            raise Refused(1, f"The resource_policy resource {name!r} is already being used by a group")
        if kind == "templates" and any(group["template"] == name for group in state["groups"].values()):
            raise Refused(1, f"The instance_template resource {name!r} is already being used by a group")
        for vm in table[name].get("vms", []):
            _kill(vm)
        del table[name]
        return None
    group = table[name]
    if verb == "resize":
        return resize(cloud, state, name, int(flags["--size"]))
    if verb == "list-instances":
        vms = [{"instance": f"zones/z/instances/{name}-{n}", "instanceStatus": vm["status"]} for n, vm in
               enumerate(group["vms"])]  # fmt: skip
        return vms + [{"instance": "", "instanceStatus": None} for _ in range(group["size"] - len(vms))]
    raise Refused(2, f"Invalid choice: {command!r}")


def make(state: dict[str, Any], kind: str, name: str, flags: dict[str, str]) -> None:
    """Makes a policy, a template or a group, if google.md's rules allow it."""
    if kind == "templates":
        startup = Path(flags["--metadata-from-file"].removeprefix("startup-script=")).read_text()
        state[kind][name] = {"startup": startup, "model": flags["--provisioning-model"], "flags": flags}
    elif kind == "groups":
        if flags["--template"] not in state["templates"]:
            raise refusal("absent", NAME=flags["--template"])
        policy = flags.get("--workload-policy", "")
        if policy and not policy.startswith("projects/"):
            raise Refused(1, "Invalid value for field 'resource.resourcePolicies.workloadPolicy'")
        model, bulk = state["templates"][flags["--template"]]["model"], "--target-size-policy-mode" in flags
        if bulk and (model not in ("FLEX_START", "RESERVATION_BOUND") or flags["--size"] != "0"):
            raise Refused(1, "Target size policy mode BULK is not supported here")
        state[kind][name] = {"template": flags["--template"], "policy": policy, "bulk": bulk, "size": 0, "vms": []}
    else:
        state[kind][name] = {"flags": flags}


def resize(cloud: Cloud, state: dict[str, Any], name: str, size: int) -> None:
    """Brings a group to its size, as far as there are machines: all or none in bulk mode."""
    group = state["groups"][name]
    group["size"] = size
    path = cloud.home / "hosts"
    free = int(path.read_text()) if path.exists() else size
    if group["bulk"] and free < size:
        return
    for worker in range(len(group["vms"]), min(size, free)):
        home = cloud.home / f"{name}-{worker}"
        group["vms"].append(boot(home, worker, state["templates"][group["template"]]["startup"]))


def queued(cloud: Cloud, state: dict[str, Any], command: str, names: list[str], flags: dict[str, str]) -> Any:
    """Queued resources and their node. A state lasts for one look."""
    table, name, verb = state["queued"], names[0], command.split()[-1]
    if verb == "create":
        if name in table:
            raise refusal("exists", NAME=name)
        table[name] = {"state": "ACCEPTED", "flags": flags}
        return None
    if name not in table:
        raise refusal("absent-tpu", NAME=name)
    one = table[name]
    if "tpu-vm" in command:
        return {"networkEndpoints": [{"ipAddress": "127.0.0.1"} for _ in range(16)]}
    if verb == "describe":
        now = one["state"]
        free = not (cloud.home / "hosts").exists()
        after = {"ACCEPTED": "WAITING_FOR_RESOURCES", "PROVISIONING": "ACTIVE"}
        if free:
            after["WAITING_FOR_RESOURCES"] = "PROVISIONING"
        one["state"] = after.get(now, now)
        return {"state": {"state": now}}
    if "--force" not in flags and one["state"] not in ("ACCEPTED", "FAILED", "SUSPENDED"):
        raise Refused(1, "FAILED_PRECONDITION: the queued resource has nodes")
    del table[name]
    for host in range(16):
        _kill_under(cloud.home / f"node-{host}")
        subprocess.run(["rm", "-rf", str(cloud.home / f"node-{host}")], check=True)
    return None


def ssh(cloud: Cloud, node: str, worker: int, command: str) -> int:
    """Runs a command on a host of a node that is there, and returns its status."""
    with cloud.held() as state:
        if state["queued"].get(node, {}).get("state") != "ACTIVE":
            raise refusal("absent-tpu", NAME=node)
    home = cloud.home / f"node-{worker}"
    home.mkdir(exist_ok=True)
    env = {"PATH": os.environ["PATH"], "HOME": str(home)}
    return subprocess.run(["sh", "-c", command], cwd=home, env=env).returncode


def main(argv: list[str]) -> int:
    cloud = Cloud(Path(os.environ["FAKE_GCLOUD"]))
    cloud.home.mkdir(parents=True, exist_ok=True)
    with open(cloud.home / "calls", "a") as file:
        file.write(json.dumps(argv) + "\n")
    try:
        said = answer(cloud, argv)
    except Refused as error:
        print(f"ERROR: (gcloud.{'.'.join(argv[:4])}) {error}", file=sys.stderr)
        return error.status
    if isinstance(said, int) and not isinstance(said, bool):
        return said
    if said is not None:
        print(said if isinstance(said, str) else json.dumps(said), end="")
    return 0


def install(home: Path, monkeypatch: Any) -> Cloud:
    """Puts the fake on the PATH, as `gcloud`, for this test and what it starts."""
    program = home / "bin" / "gcloud"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -S {Path(__file__).resolve()} "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_GCLOUD", str(home / "cloud"))
    return Cloud(home / "cloud")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
