"""What the environment variables of launchers make of a process."""

import os

import pytest

from memfree.slurm.launcher import Launch, as_one_run, is_launchers, joined, launched

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
}
SRUN = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "1",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "3",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_NNODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_TASK_PID": "77",
    "SLURM_JOB_NAME": "bash",
}
ONE_TASK = {**SRUN, "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}
# The shell that salloc opens as a step: the number of tasks is the allocation's.
SHELL = {**ONE_TASK, "SLURM_NTASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "1"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
POD = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "pod-0", "MASTER_PORT": "23456"}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in [name for name in os.environ if is_launchers(name)]:
        monkeypatch.delenv(name)


def told(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "launch"),
    [
        ({}, ("Lightning", 0, 1)),
        (TORCHRUN, ("torchrun", 3, 4, 1, (2,))),
        (SRUN, ("srun", 2, 3, 0, (2, 1))),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, ("srun", 1, 2, None, (2,))),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, ("srun", 2, 3, 0, (2,))),
        (OPEN_MPI, ("mpirun", 1, 2, 1, (2,))),
        (MPICH, ("mpirun", 1, 2, 1, (2,))),
        (POD, ("the launcher that set RANK", 1, 4)),
        ({"RANK": "1"}, ("the launcher that set RANK", 1, None)),
        # One of a launcher inside another: the inner one has started the process.
        ({**SRUN, **TORCHRUN}, ("torchrun", 3, 4, 1, (2,))),
        ({**SRUN, **OPEN_MPI}, ("mpirun", 1, 2, 1, (2,))),
        ({**SRUN, **MPICH}, ("mpirun", 1, 2, 1, (2,))),
        ({**SRUN, "PMI_RANK": "2", "PMI_SIZE": "3"}, ("srun", 2, 3, 0, (2, 1))),
        (
            {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
            ("torchrun", 0, 1, 0, (2,)),
        ),
        (ONE_TASK, ("srun", 0, 1)),
        (SHELL, ("srun", 0, 1)),
        ({**SHELL, "PMI_RANK": "0", "PMI_SIZE": "1"}, ("srun", 0, 1)),
        # What Lightning itself has started, also in a task of SLURM's.
        ({"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2"}, ("Lightning", 1, 2, 1)),
        ({**ONE_TASK, "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, ("Lightning", 1, 2, 1)),
        ({"NODE_RANK": "1"}, ("Lightning", 1, None, 0)),
        # A shell in an allocation, and a batch script: one process, whatever was asked for.
        ({"SLURM_JOB_ID": "12", "SLURM_NTASKS": "4", "SLURM_NNODES": "2"}, ("Lightning", 0, 1)),
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_TASK_PID": "77"},
            ("Lightning", 0, 1),
        ),
    ],
)
def test_the_innermost_launcher_is_read(monkeypatch, variables, launch):
    told(monkeypatch, variables)
    assert launched() == Launch(*launch)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", ""),
        ("RANK", "x"),
        ("RANK", "-1"),
        ("RANK", "9" * 5000),
        ("LOCAL_RANK", "x"),
        ("LOCAL_RANK", "1.5"),
        ("LOCAL_RANK", "٣"),
        ("NODE_RANK", "first"),
        ("WORLD_SIZE", "0"),
        ("WORLD_SIZE", ""),
        ("LOCAL_WORLD_SIZE", "two"),
        ("SLURM_PROCID", ""),
        ("SLURM_LOCALID", "a"),
        ("SLURM_NODEID", "a"),
        ("SLURM_NTASKS", "many"),
        ("SLURM_NTASKS", "0"),
        ("SLURM_NTASKS_PER_NODE", "a"),
        ("SLURM_NNODES", ""),
        ("SLURM_JOB_ID", "job"),
        ("OMPI_COMM_WORLD_RANK", "x"),
        ("OMPI_COMM_WORLD_SIZE", ""),
        ("PMI_RANK", "x"),
        ("JSM_NAMESPACE_RANK", "x"),
        ("FLUX_TASK_RANK", "x"),
        ("SLURM_STEP_NUM_TASKS", "0"),
    ],
)
def test_a_spoilt_variable_is_named(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=rf"variable {name}\b"):
        launched()


@pytest.mark.parametrize(
    ("name", "value"),
    # Kubernetes sets the first for a service that is called master.
    [("MASTER_PORT", "tcp://10.0.0.1:80"), ("MASTER_PORT", "70000"), ("MASTER_ADDR", "")],
)
def test_where_processes_meet_matters_to_several_only(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with as_one_run(launched(), 1):
        assert os.environ[name] == value
    with pytest.raises(ValueError, match=rf"variable {name}\b"), as_one_run(launched(), 2):
        pass


def test_variables_of_users_are_left_alone(monkeypatch):
    users = {"ROLE_ARN": "arn:aws:iam::1:role/x", "GROUP_ID": "7"}
    told(monkeypatch, {**TORCHRUN, **users, "ROLE_RANK": "3", "GROUP_WORLD_SIZE": "2"})
    with as_one_run(launched(), 1):
        assert users.items() <= os.environ.items()
        assert not {"ROLE_RANK", "GROUP_WORLD_SIZE"} & os.environ.keys()


@pytest.mark.parametrize(
    ("rank", "size"),
    [
        ("RANK", "WORLD_SIZE"),
        ("LOCAL_RANK", "LOCAL_WORLD_SIZE"),
        ("LOCAL_RANK", "WORLD_SIZE"),
        ("SLURM_PROCID", "SLURM_NTASKS"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("PMI_RANK", "PMI_SIZE"),
    ],
)
def test_a_rank_outside_its_world_is_named(monkeypatch, rank, size):
    told(monkeypatch, {rank: "2", size: "2"})
    with pytest.raises(ValueError, match=f"{rank} is 2 and {size} 2"):
        launched()


@pytest.mark.parametrize(
    ("variables", "devices", "nodes", "together"),
    [
        ({}, 1, 1, False),
        ({}, 4, 1, False),
        ({}, 4, 2, True),
        (TORCHRUN, 1, 1, False),
        (TORCHRUN, 2, 2, True),
        (SRUN, 1, 1, False),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, 2, 1, True),
        (ONE_TASK, 4, 1, False),  # Lightning starts the other three
        (SHELL, 4, 1, False),
        (OPEN_MPI, 2, 1, True),
        (POD, 1, 4, True),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, 2, 1, True),
        ({"NODE_RANK": "1"}, 2, 2, True),
        ({"NODE_RANK": "1"}, 1, 1, False),
    ],
)
def test_options_say_whether_processes_are_one_run(
    monkeypatch, variables, devices, nodes, together
):
    told(monkeypatch, variables)
    assert joined(launched(), devices, nodes) == together


@pytest.mark.parametrize(
    ("variables", "devices", "nodes", "said"),
    [
        (TORCHRUN, 4, 1, "--trainer.devices 2 --trainer.num_nodes 2"),
        (TORCHRUN, 3, 1, "--trainer.devices 1"),
        (SRUN, 3, 1, "as many on each node"),
        (ONE_TASK, 2, 2, "srun started 1 process;"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "1(x3)"}, 3, 1, "--trainer.num_nodes 3"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, 2, 1, "--trainer.devices 4"),
        ({"RANK": "1"}, 2, 1, "WORLD_SIZE"),
        ({"LOCAL_RANK": "2"}, 2, 1, "LOCAL_RANK"),
        ({"NODE_RANK": "2"}, 2, 2, "NODE_RANK"),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "4"}, 2, 1, "WORLD_SIZE"),
        # Launchers that do not say how many they have started.
        ({"SLURM_PROCID": "1"}, 2, 1, "SLURM_NTASKS does not say"),
        ({"OMPI_COMM_WORLD_RANK": "1"}, 2, 1, "OMPI_COMM_WORLD_SIZE does not say"),
        ({"TORCHELASTIC_RUN_ID": "a", "RANK": "1"}, 2, 1, "WORLD_SIZE does not say"),
        # Machines with unequal numbers: no number of devices fits all.
        ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "3"}, 3, 1, "as many on each node"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "3", "SLURM_NTASKS_PER_NODE": "2"}, 2, 1, "as many"),
        # A place that such a run does not have: four pods that call themselves first of theirs.
        ({**POD, "LOCAL_RANK": "0"}, 4, 1, "number 1 of all and number 0 of its machine"),
        ({**POD, "LOCAL_RANK": "3"}, 2, 2, "number 3 of its machine"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1"}, 1, 2, "number 1 of its"),
    ],
)
def test_other_numbers_of_processes_are_refused(monkeypatch, variables, devices, nodes, said):
    told(monkeypatch, variables)
    with pytest.raises(ValueError, match="--trainer") as refusal:
        joined(launched(), devices, nodes)
    assert said in str(refusal.value)


def environment(monkeypatch, variables, devices=1, nodes=1):
    told(monkeypatch, variables)
    before = dict(os.environ)
    with as_one_run(launched(), devices, nodes):
        os.environ.setdefault("WORLD_SIZE", "7")  # as Lightning does
        inside = {name: os.environ[name] for name in os.environ if is_launchers(name)}
        launch = launched()
    assert dict(os.environ) == before
    return launch, inside


@pytest.mark.parametrize("tasks", ["1,2(x999999999)", "٣", "2(x2", "9999999", "1,2,"])
def test_tasks_of_nodes_that_slurm_does_not_write_are_named(monkeypatch, tasks):
    task = {"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_TASKS_PER_NODE": tasks}
    told(monkeypatch, task)
    with pytest.raises(ValueError, match="variable SLURM_STEP_TASKS_PER_NODE="):
        launched()


@pytest.mark.parametrize(
    "variables",
    [TORCHRUN, SRUN, OPEN_MPI, MPICH, POD, {"NODE_RANK": "1"}, {"SLURM_PROCID": "3"}],
)
def test_a_run_by_itself_forgets_the_launcher(monkeypatch, variables):
    launch, inside = environment(monkeypatch, variables)
    assert (launch.rank, launch.size) == (0, 1)
    assert not {"RANK", "LOCAL_RANK", "MASTER_ADDR"} & inside.keys()
    # It is still a task of its job, which puts that back into the queue.
    assert inside.get("SLURM_PROCID") == ("0" if "SLURM_PROCID" in variables else None)


def test_processes_of_one_run_know_where_to_meet(monkeypatch):
    two = {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
    second = {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}
    _, inside = environment(monkeypatch, {**SRUN, **two, **second}, 2)
    assert inside["SLURM_NTASKS_PER_NODE"] == "2"
    assert inside["MASTER_ADDR"] == "node07"
    assert inside["MASTER_PORT"] == str(15000 + 12 + 1009)  # another step of the job has another


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("n[3-5,9],b", "n3"),
        ("n[12]-ib", "n12-ib"),
        ("n-1-[2,4]x", "n-1-2x"),
    ],
)
def test_the_first_node_of_a_step(monkeypatch, nodes, first):
    two = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": nodes}
    assert environment(monkeypatch, two, 2)[1]["MASTER_ADDR"] == first


def test_what_the_launcher_leaves_out_is_worked_out(monkeypatch):
    four = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_NNODES": "2"}
    _, inside = environment(monkeypatch, four, 2, 2)
    assert (inside["SLURM_NODEID"], inside["SLURM_LOCALID"]) == ("1", "1")
    for name in four:
        monkeypatch.delenv(name)
    _, inside = environment(monkeypatch, POD, 2, 2)
    assert inside["LOCAL_RANK"] == "1"


def test_mpi_processes_get_the_variables_of_torch(monkeypatch):
    _, inside = environment(monkeypatch, OPEN_MPI, 2)
    assert [inside[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["1", "2", "1"]
    far = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    told(monkeypatch, far)
    with pytest.raises(ValueError, match="MASTER_ADDR"), as_one_run(launched(), 1, 2):
        pass
