"""The page of `jaxzs app`: fields, buttons and where results appear, in Gradio. What buttons do is in `app.Desk`."""

from __future__ import annotations

import html
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jaxzs.clip.hub import EMBEDDED
from jaxzs.commands.app import Asked, Desk, Shown
from jaxzs.commands.terminal import explained
from jaxzs.data.images import MAX_FILE_BYTES
from jaxzs.errors import DataError

if TYPE_CHECKING:
    import gradio as gr

_MODELS = (
    *EMBEDDED,
    "openai/clip-vit-base-patch32",
    "openai/clip-vit-base-patch16",
    "openai/clip-vit-large-patch14",
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    "google/siglip-base-patch16-224",
)
_STYLE = """
.gradio-container { width: 100%; max-width: 1600px !important; margin: 0 auto; }
.gradio-container button[role="tab"].selected { color: var(--primary-600) !important; }
.dark .gradio-container button[role="tab"].selected { color: var(--primary-400) !important; }
.gradio-container :is(input, textarea, button):focus-visible { outline: 2px solid var(--primary-600) !important; }
.gradio-container button.primary:focus-visible { outline-offset: 2px; }
.dark .gradio-container :is(input, textarea, button):focus-visible { outline-color: var(--primary-400) !important; }
.waiting:has(.wrap:not(.hide)) { min-height: 110px; }
.waiting:not(:has(.wrap:not(.hide))) { display: none; }
.results iframe { width: 100%; height: 780px; border: 1px solid var(--border-color-primary); border-radius: 8px; }
.results pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: 8px 12px; }
.results p { margin: 6px 0; }
.pictures .grid-wrap { min-height: 0 !important; max-height: 900px !important; }
.pictures .gallery-item, .pictures .thumbnail-lg { aspect-ratio: auto !important; }
"""


def launched(desk: Desk) -> gr.Blocks:
    """The page, served on this machine alone, and until it is closed."""
    # What is dropped goes where the results go, and goes with them when the server ends.
    os.environ["GRADIO_TEMP_DIR"] = str(desk.folder / "uploads")
    page, options = build(desk), desk.options
    try:
        page.launch(
            server_name="127.0.0.1",
            server_port=options.port,
            share=options.share,
            inbrowser=options.browse,
            prevent_thread_lock=True,
            quiet=True,
            max_file_size=MAX_FILE_BYTES,
            ssr_mode=False,
            footer_links=[],
            css=_STYLE,
            theme=_theme(),
        )
    except OSError as error:
        if options.port is None:
            raise
        # Gradio's own advice is for those who call `launch`.
        raise DataError(f"--port {options.port} is taken: name another, or none for the first free one") from error
    return page


def _theme() -> gr.themes.Base:
    """Gradio's own; its small print and its button are too pale to be read by everyone (WCAG's contrast of 4.5)."""
    import gradio as gr

    theme = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    return theme.set(
        block_info_text_color="*neutral_600",
        body_text_color_subdued="*neutral_600",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        checkbox_border_color="*neutral_500",
        checkbox_border_color_dark="*neutral_400",
    )


def build(desk: Desk) -> gr.Blocks:
    """Fields that all share on the left, what can be done with them on the right."""
    import gradio as gr

    with gr.Blocks(title="jaxzs", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown("# jaxzs\nLabels, tags and masks for your images, without training and without labels.")
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                asked = _fields(desk)
            with gr.Column(scale=3, min_width=480):
                head = gr.State(None)
                with gr.Tab("Labels"):
                    _labels(desk, asked, head)
                with gr.Tab("Learn from a folder"):
                    _learn(desk, asked, head)
                with gr.Tab("Tags"):
                    _tags(desk, asked)
                with gr.Tab("Masks"):
                    _masks(desk, asked)
    page.queue(default_concurrency_limit=1, api_open=False)
    return page


# --- fields and tabs ------------------------------------------------------------------------------------------------


def _fields(desk: Desk) -> list[Any]:
    """In the order of `Asked`."""
    import gradio as gr

    options = desk.options
    model = gr.Dropdown(
        [options.model] if options.share else list(dict.fromkeys([options.model, *_MODELS])),
        value=options.model,
        allow_custom_value=not options.share,
        label="Model",
        info=None if options.share else "or type a hub id, or the name of a folder",
    )
    there = f"Images, instead of {', '.join(options.images)}" if options.images else "Images"
    files = gr.File(file_count="multiple", file_types=["image"], label=there, height=190)
    labels = gr.Textbox(options.labels or "", label="Classes", lines=3, placeholder="cat, dog, bird")
    with gr.Accordion("Sentences", open=False):
        templates = gr.Textbox(
            "",
            label="One a line, with {} where the class goes",
            placeholder="a photo of a {}.",
            lines=3,
            info="without any, those of the method",
        )
    return [model, files, labels, templates]


def _labels(desk: Desk, asked: list[Any], head: gr.State) -> None:
    import gradio as gr

    method = gr.Radio(
        [
            ("adapted to these images", "auto"),
            ("by the text alone", "zero-shot"),
            ("as learned from a folder", "learned"),
        ],
        value="auto",
        label="Method",
        info="Adapting needs no labels, and more than a few images.",
    )

    def label(asked: Asked, method: Any, head: str | None) -> list[Any]:
        if method != "learned":
            return _results(desk.classify(asked, method))
        if head is None:
            raise DataError("nothing has been learned yet: drop images into the tab Learn from a folder")
        return _results(desk.classify(asked, "auto", head))

    _button(desk, "Label the images", label, [*asked, method, head])


def _learn(desk: Desk, asked: list[Any], head: gr.State) -> None:
    import gradio as gr

    gr.Markdown(
        "Learns from many images at once what the classes look like in them, **without labels**. What is learned can "
        "then label other images, one at a time: in the tab Labels, *as learned from a folder*."
    )
    folder = gr.File(
        file_count="directory", label="A folder of images; without one, the images on the left", height=150
    )

    def learn(asked: Asked, folder: list[str] | None) -> list[Any]:
        shown, learned = desk.learn(asked._replace(files=folder) if folder else asked)
        return [*_results(shown), learned]

    _button(desk, "Learn", learn, [*asked, folder], [head])


def _tags(desk: Desk, asked: list[Any]) -> None:
    import gradio as gr

    background = _background()
    threshold = gr.Slider(0, 1, 0.5, label="Threshold", info="Between an image's lowest and highest score.")
    _button(desk, "Find tags", lambda asked, *more: _results(desk.tag(asked, *more)), [*asked, background, threshold])


def _masks(desk: Desk, asked: list[Any]) -> None:
    import gradio as gr

    background = _background()
    maps = gr.Radio(
        [("activation maps (CLIP-ES)", "cam"), ("patch scores", "scores"), ("every pixel its nearest name", "dense")],
        value="scores" if desk.options.model in EMBEDDED else "cam",
        label="Where classes are",
    )
    crf = gr.Checkbox(False, label="Sharpen along the edges of the photo (CRF)")
    _button(
        desk, "Make masks", lambda asked, *more: _results(desk.segment(asked, *more)), [*asked, background, maps, crf]
    )


def _background() -> gr.Textbox:
    import gradio as gr

    return gr.Textbox("", label="What else may be seen", info="Names that compete, and are never an answer.")


# --- what a button does ---------------------------------------------------------------------------------------------


def _outputs() -> list[Any]:
    """Where results appear, in the order of `_results`."""
    import gradio as gr

    return [
        gr.Gallery(label="Pictures", columns=1, height="auto", elem_classes="pictures", visible=False),
        gr.HTML(elem_classes="results", visible=False),
        gr.HTML(elem_classes="results", visible=False),
        gr.File(label="Files", file_count="multiple", interactive=False, visible=False),
    ]


def _results(shown: Shown) -> list[Any]:
    import gradio as gr

    return [
        gr.Gallery(shown.pictures, visible=bool(shown.pictures)),
        gr.HTML(shown.page, visible=True),
        gr.HTML(shown.told, visible=True),
        gr.File(shown.files, visible=True),
    ]


def _button(
    desk: Desk, name: str, function: Callable[..., list[Any]], inputs: list[Any], more: list[Any] | None = None
) -> None:
    """A button, and below it the results of a function of `Asked` and what else is asked; errors by their names."""
    import gradio as gr

    # The commands' own bars, which they do not draw here, appear below the button.
    def run(typed: dict[Any, Any], progress: gr.Progress = gr.Progress(track_tqdm=True)) -> list[Any]:  # noqa: B008
        model, files, labels, templates, *others = (typed[field] for field in inputs)
        try:
            return function(Asked(model, files or (), labels, templates), *others)
        except Exception as error:
            message = explained(error)
            if message is None:
                raise  # a fault of ours: the traceback is wanted where the server runs, the page says "Error"
            # Gradio takes it for HTML.
            raise gr.Error(html.escape(desk.plain(message)), duration=None, print_exception=False) from error

    button, waiting = gr.Button(name, variant="primary"), gr.HTML(elem_classes="waiting")
    outputs = [*_outputs(), *(more or ())]
    # One run at a time, whichever button: a device has no room for two.
    button.click(run, set(inputs), outputs, api_visibility="private", concurrency_id="jaxzs", show_progress_on=waiting)
