"""One line of this room, broken: each must turn one of the named tests red."""

from mutation import Mutation

DIFFUSERS_FILE = "checkpoints/diffusers_file.py"
PEFT_FOLDER = "checkpoints/peft_folder.py"
PEFT_MODEL = "checkpoints/peft_model.py"
SAFETENSORS_FILE = "checkpoints/safetensors_file.py"
TEST_BOUNDED = ("adapters/test_bounded.py",)
TEST_DIFFUSERS_FILE = ("checkpoints/test_diffusers_file.py",)
TEST_PEFT_FOLDER = ("checkpoints/test_peft_folder.py",)
TEST_PEFT_MODEL = ("checkpoints/test_peft_model.py",)
TEST_ATTACH_PEFT = ("model/test_attach_peft.py",)
MUTATIONS = {
    "peft_model: any scaling": Mutation(
        PEFT_MODEL, "return check_number(found,", "return (lambda n, *_: n)(found,", TEST_PEFT_MODEL
    ),
    "peft_model: a model that believes to have adapters": Mutation(
        PEFT_MODEL, "_hf_peft_config_loaded = False", "_x = 0", TEST_ATTACH_PEFT
    ),
    "diffusers file: paths are patterns": Mutation(
        DIFFUSERS_FILE, "re.escape(path)", "path", TEST_DIFFUSERS_FILE
    ),
    "diffusers file: no metadata": Mutation(
        DIFFUSERS_FILE, "if own else", "if not own else", TEST_DIFFUSERS_FILE
    ),
    "residency: a changed file is read": Mutation(
        SAFETENSORS_FILE,
        "if _state(os.fstat(file.fileno())) != self._state:",
        "if False:",
        TEST_BOUNDED,
    ),
    "residency: values that are not finite come in": Mutation(
        PEFT_FOLDER, "_check_finite(source, key, values[key])", "pass", TEST_BOUNDED
    ),
    "peft_folder: links lead anywhere": Mutation(
        PEFT_FOLDER, "if not file.is_symlink():", "if True:", TEST_PEFT_FOLDER
    ),
}
