"""Healing in a Trainer of transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from structmat.surgery.healing.loss import check_weights
from structmat.surgery.healing.methods import Distill, attention_mask
from structmat.surgery.healing.models import Train, check_models, kept, set_mode, set_trainable, trained_parameters


def healing_trainer(
    dense: nn.Module,
    *,
    train: Train = "structured",
    hidden: Sequence[str] | None = None,
    hidden_weight: float = 1.0,
    output_weight: float = 1.0,
    temperature: float = 1.0,
    head: str | None = None,
    dropout: bool = False,
) -> type[Any]:
    """A subclass of ``transformers.Trainer`` whose loss is :func:`healing_loss` against a dense model.

    Everything else is the Trainer's: its optimizer and schedule (mind ``weight_decay``, which shrinks factors),
    precision, checkpoints, logging, several processes. ``save_pretrained`` and the Trainer's checkpoints hold the
    factors as a state dict; :func:`save_file` writes a file that :func:`load_file` reads into the dense architecture.
    The Trainer's ``compute_loss_func`` would not do: it gets the outputs, but not the inputs that the dense model
    needs.

    Evaluation reports the healing loss as ``eval_loss`` where batches have labels, which are not looked at otherwise.

    Args:
        dense: what the model was compressed from; called in evaluation mode without gradients, where it is: put it on
            the device of training yourself.
        train: as for :func:`heal`; ``requires_grad`` flags are put back when ``train()`` ends.
        hidden: as for :func:`heal`.
        hidden_weight: as for :func:`healing_loss`.
        output_weight: as for :func:`healing_loss`.
        temperature: as for :func:`healing_loss`.
        head: as for :func:`healing_loss`.
        dropout: as for :func:`heal`. The Trainer's ``gradient_checkpointing`` needs it, as it works in training mode
            only.

    Returns:
        The class, to be called as ``transformers.Trainer`` is.

    Raises:
        ImportError: if transformers or accelerate is not installed.
        ValueError: as for :func:`healing_loss`.

    Example:
        >>> import copy, tempfile, torch, structmat, transformers
        >>> from structmat import surgery
        >>> size = dict(n_embd=32, n_layer=1, n_head=2, n_positions=16, vocab_size=50)
        >>> dense = transformers.GPT2LMHeadModel(transformers.GPT2Config(**size))
        >>> small = copy.deepcopy(dense)
        >>> report = surgery.compress_(small, structmat.MonarchConfig(nblocks=4))
        >>> texts = [{"input_ids": torch.randint(50, (8,))} for _ in range(16)]
        >>> arguments = transformers.TrainingArguments(
        ...     tempfile.mkdtemp(), max_steps=2, report_to="none", disable_tqdm=True, use_cpu=True, learning_rate=1e-3
        ... )
        >>> trainer = surgery.healing_trainer(dense)(model=small, args=arguments, train_dataset=texts)
        >>> result = trainer.train()  # doctest: +ELLIPSIS
        {...
        >>> result.global_step, result.training_loss > 0
        (2, True)
    """
    check_weights(hidden_weight, output_weight, temperature, head)
    try:
        import accelerate  # noqa: F401 - the Trainer cannot do without
        from transformers import Trainer
    except ImportError as error:
        raise ImportError(f"healing_trainer needs transformers and accelerate: {error}") from error
    options = {
        "hidden_weight": hidden_weight,
        "output_weight": output_weight,
        "temperature": temperature,
        "head": head,
    }

    class HealingTrainer(Trainer):
        """A Trainer that brings its model's outputs close to those of a dense one."""

        # A mean over the batch, to be divided by the number of batches in a step.
        loss_is_scaled_for_ga = False

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            check_models(self.model, dense)
            if self.args.gradient_checkpointing and not dropout:
                raise ValueError("TrainingArguments.gradient_checkpointing works in training mode: give dropout=True")
            self.model_accepts_loss_kwargs = False  # what says the same to releases without loss_is_scaled_for_ga

        def train(self, *args: Any, **kwargs: Any) -> Any:
            model: Any = self.model
            chosen = trained_parameters(model, dense, train)
            with kept(model), kept(dense):
                set_trainable(model, chosen)
                return super().train(*args, **kwargs)

        def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
            model: Any = self.model
            with kept(model), kept(dense):
                return super().evaluation_loop(*args, **kwargs)

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Tensor | tuple[Tensor, Any]:
            set_mode(model, dropout and model.training)
            dense.eval()
            unwrapped: Any = self.model
            method = Distill(unwrapped, dense, None, attention_mask, None, hidden, options, wrapper=model)
            try:
                loss, outputs = method.loss(inputs)
            finally:
                method.close()
            if not return_outputs or not isinstance(outputs, Mapping):
                return (loss, outputs) if return_outputs else loss
            # Hidden states are for the loss; the Trainer would gather them over the whole evaluation.
            return loss, {key: value for key, value in outputs.items() if not key.endswith("hidden_states")}

    return HealingTrainer
