"""``ditscale serve``: open a local page where images of a checkpoint are sampled."""

import importlib.util
from contextlib import closing

from core.progress import ProgressBar
from launch.command.settings import LOCAL_HOSTS, ServeSettings
from launch.jobs import start


def serve_job(config: ServeSettings, progress: ProgressBar) -> None:
    """Serve the page until SIGINT or SIGTERM. Raises ValueError where Gradio is missing, and for a port in use."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError(
            "ditscale serve needs Gradio, which is not installed; install the extra `serve`: "
            "pip install -e '.[serve]' -c constraints.txt."
        )
    from launch.page.page import application_of, build_page, private_gradio
    from launch.page.server import closed_to_others, listen, served, stop_signals, url_of
    from launch.page.studio import Studio

    with private_gradio(), closing(listen(config.host, config.port)) as listener:
        studio = Studio.of(config)
        hosts = () if config.allow_remote else LOCAL_HOSTS
        application = closed_to_others(application_of(build_page(studio), hosts))
        with served(application, listener), closing(studio.streams), stop_signals() as wait:
            print(f"{studio.checkpoint.path}: sample it at {url_of(listener)} (Ctrl-C ends the page)", flush=True)
            wait()


if __name__ == "__main__":
    start("serve")
