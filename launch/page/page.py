"""Build the page: its fields on the left, the grid on the right."""

import html
import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

from evaluation.grid import save_picture
from launch.builders.choices import Section
from launch.page.studio import Form, Studio

# Pictures are files of Gradio's cache; it deletes those that are older than the second number of seconds.
_DELETED_EVERY_SEC, _KEPT_SEC = 60, 600
_FONTS = ("system-ui", "sans-serif")
_FONTS_OF_CODE = ("ui-monospace", "monospace")


@contextmanager
def private_gradio() -> Iterator[None]:
    """Make Gradio keep its files in a folder of its own, deleted at the end, and send nothing to anybody."""
    with tempfile.TemporaryDirectory(prefix="ditscale-serve-") as folder:
        wanted = {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def build_page(studio: Studio) -> gr.Blocks:
    """Return the page of a studio."""
    config, first = studio.config, next(iter(studio.samplers.values()))
    with gr.Blocks(
        title="ditscale serve", analytics_enabled=False, delete_cache=(_DELETED_EVERY_SEC, _KEPT_SEC)
    ) as page:
        with gr.Row():
            with gr.Column(scale=1):
                gr.Textbox(str(studio.checkpoint.path), label="checkpoint", interactive=False)
                asked = studio.fields.components()
                seed = gr.Textbox(str(config.seed), label="seed")
                count = gr.Number(config.num_images, label="number of images")
                sampler = gr.Dropdown(list(studio.samplers), label="sampler", allow_custom_value=True)
                steps = gr.Textbox(_steps_of(first), label="steps", visible="steps" in first)
                scale = gr.Number(
                    None if studio.guidance is None else studio.guidance["scale"],
                    label="guidance scale",
                    info="1: none",
                    visible=studio.guidance is not None,
                )
                with gr.Row():
                    run = gr.Button("Sample", variant="primary")
                    stop = gr.Button("Stop")
            with gr.Column(scale=3):
                grid = gr.Image(
                    label="images",
                    show_label=False,
                    format="png",
                    interactive=False,
                    buttons=["download", "fullscreen"],
                )
                text = gr.Textbox(label="shown", interactive=False)
        _connect(studio, [seed, count, sampler, steps, scale, *asked], (run, stop), (grid, text))
        sampler.change(lambda name: _field_of_steps(studio, name), sampler, steps, api_visibility="private")
    return page


def _connect(studio: Studio, fields: list[Any], buttons: tuple[Any, Any], shown: tuple[Any, Any]) -> None:
    """Make the buttons begin and end the sampling of what the fields say."""
    grid, _ = shown
    # A file of its own for each picture: Gradio would write equal ones over each other while a browser fetches them.
    files = (Path(grid.GRADIO_CACHE) / f"grid-{number}.png" for number in itertools.count())

    def sample(seed: Any, count: Any, sampler: Any, steps: Any, scale: Any, *asked: Any) -> Iterator[tuple[str, str]]:
        try:
            for view in studio.views(Form(seed, count, sampler, steps, scale, asked)):
                save_picture(file := next(files), view.picture)
                yield str(file), view.text
        except ValueError as error:
            # Gradio shows the text as HTML, and a name in it may come from a stranger's checkpoint.
            sentence = html.escape(str(error), quote=False)
            raise gr.Error(sentence, duration=None, print_exception=False) from error

    run, stop = buttons
    running = run.click(sample, fields, list(shown), api_name="sample", concurrency_limit=1, show_progress="hidden")
    stop.click(None, cancels=[running], api_visibility="private")


def _steps_of(section: Section) -> str:
    """Return a sampler's number of steps as text, with commas between several, or nothing where it has none."""
    steps = section.get("steps", "")
    return ",".join(map(str, steps)) if isinstance(steps, list) else str(steps)


def _field_of_steps(studio: Studio, sampler: str) -> Any:
    """Return the field of steps with the sampler's usual number, hidden where it chooses its steps itself."""
    section = studio.samplers.get(str(sampler), {})
    return gr.update(value=_steps_of(section), visible="steps" in section)


def application_of(page: gr.Blocks, hosts: Sequence[str]) -> FastAPI:
    """Return the web application of a page, for requests to these hosts, or to any where there are none."""
    application = FastAPI(openapi_url=None)
    if hosts:  # another site could otherwise get the browser to reach the page under a name of its own
        application.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    theme = gr.themes.Default(font=_FONTS, font_mono=_FONTS_OF_CODE)
    mounted: FastAPI = gr.mount_gradio_app(
        application,
        page,
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme,
        show_error=False,
    )
    return mounted
