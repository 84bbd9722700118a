"""Send the rest of a run to MLflow's server: metrics, files, the model and the final status not yet received."""

from capexp import cli


def sync(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = cli.Parser("sync", __doc__, ())
    parser.add_argument("run_id", metavar="RUN_ID", help="the id of the run, printed when the run ended")
    arguments, _ = parser.parse(argv)

    from capexp.runs.folder import RunFolder
    from capexp.runs.registration import Registration, carry_out, delete_bundle
    from capexp.tracking.known_runs import run_status
    from capexp.tracking.run import TrackedRun
    from capexp.tracking.store import check_store, is_local, no_retries, store_faults

    folder = RunFolder.with_journal(arguments.run_id)
    check_store(run_id=arguments.run_id)
    run_status(arguments.run_id)  # raises InputError if the store does not know the run
    with folder.lock(), store_faults(), no_retries():
        tracked = TrackedRun(arguments.run_id, folder.path, in_background=not is_local())
        sent, version, state = tracked.send_rest(lambda content: carry_out(tracked, Registration(**content)))
        delete_bundle(folder.path)
    print(f"run         {arguments.run_id}: {sent or 'no'} entries of its journal had waited, all are sent now")
    if version is not None:
        print(f"registered  {version.describe()}")
    if state is None:
        resume = f"python -m capexp.train --resume {arguments.run_id} goes on with it"
        print(f"it was interrupted: {folder.resumed_otherwise() or resume}")
    else:
        print(f"ended       {state}")
    return 0


if __name__ == "__main__":
    cli.main("sync", sync)
