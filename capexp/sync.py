"""Sends what a run's journal holds and MLflow's server has not taken: metrics, files, the model, how the run ended."""

from capexp import cli


def sync(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = cli.Parser("sync", __doc__, "None of them decides something here.")
    parser.add_argument("run_id", metavar="RUN_ID", help="as the run's end has told it")
    arguments, settings = parser.parse(argv)
    for name in settings:
        parser.error(f"--{name} decides nothing here; the run's own settings do")

    from capexp.runs.folder import RunFolder
    from capexp.runs.registration import Registration, carry_out, delete_bundle
    from capexp.tracking.run import TrackedRun, run_status
    from capexp.tracking.store import check_store, is_local, no_retries, store_faults

    folder = RunFolder.with_journal(arguments.run_id)
    check_store()
    run_status(arguments.run_id)  # refuses one that the store does not know
    with folder.lock(), store_faults(), no_retries():
        tracked = TrackedRun(arguments.run_id, folder.path, in_background=not is_local())
        sent, version, state = tracked.send_rest(lambda content: carry_out(tracked, Registration(**content)))
        delete_bundle(folder.path)
    print(f"run         {arguments.run_id}: {sent or 'no'} entries of its journal had waited, all are sent now")
    if version is not None:
        print(f"registered  {version.describe()}")
    if state is None:
        resume = f"python -m capexp.train --resume {arguments.run_id} goes on with it"
        print(f"it was cut short: {folder.another_way_on() or resume}")
    else:
        print(f"ended       {state}")
    return 0


if __name__ == "__main__":
    cli.main("sync", sync)
