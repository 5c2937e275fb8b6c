"""One line of this room, broken: each must turn one of the named tests red."""

from mutation import Mutation

DIFFUSERS_FILE = "checkpoints/diffusers_file.py"
OPENED_FOLDER = "checkpoints/opened_folder.py"
PEFT_FOLDER = "checkpoints/peft_folder.py"
PEFT_MODEL = "checkpoints/peft_model.py"
SAFETENSORS_FILE = "checkpoints/safetensors_file.py"
TEST_BOUNDED = ("adapters/test_bounded.py",)
TEST_DIFFUSERS_FILE = ("checkpoints/test_diffusers_file.py",)
TEST_OPENED_FOLDER = ("checkpoints/test_opened_folder.py",)
TEST_PEFT_FOLDER = ("checkpoints/test_peft_folder.py",)
TEST_PEFT_MODEL = ("checkpoints/test_peft_model.py",)
TEST_SAFETENSORS_FILE = ("checkpoints/test_safetensors_file.py",)
TEST_ATTACH_PEFT = ("model/test_attach_peft.py",)
MUTATIONS = {
    "peft_model: any scaling": Mutation(
        PEFT_MODEL, "return check_number(found,", "return (lambda n, *_: n)(found,", TEST_PEFT_MODEL
    ),
    "peft_model: a model that believes to have adapters": Mutation(
        PEFT_MODEL, "_hf_peft_config_loaded = False", "_x = 0", TEST_ATTACH_PEFT
    ),
    "diffusers file: a rank for all": Mutation(
        DIFFUSERS_FILE, "return self.ranks[path]", "return self.r", TEST_DIFFUSERS_FILE
    ),
    "diffusers file: no metadata": Mutation(
        DIFFUSERS_FILE, "if own else", "if not own else", TEST_DIFFUSERS_FILE
    ),
    "residency: a changed file is read": Mutation(
        SAFETENSORS_FILE,
        "if file.state != state or",
        "if",
        TEST_BOUNDED,
    ),
    "residency: values that are not finite come in": Mutation(
        SAFETENSORS_FILE, "check_finite(file.path, key, values[key])", "pass", TEST_BOUNDED
    ),
    "peft_folder: any rank": Mutation(
        PEFT_FOLDER, "    if rank > most:", "    if False:", TEST_SAFETENSORS_FILE
    ),
    "opened_folder: links are followed": Mutation(
        OPENED_FOLDER,
        "os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK",
        "os.O_RDONLY | os.O_NONBLOCK",
        TEST_OPENED_FOLDER,
    ),
    "opened_folder: links lead anywhere": Mutation(
        OPENED_FOLDER, "or not self._is_snapshot()", "", TEST_PEFT_FOLDER
    ),
    "opened_folder: blobs are a link": Mutation(
        OPENED_FOLDER, "FOLDER | os.O_NOFOLLOW", "FOLDER", TEST_PEFT_FOLDER
    ),
    "opened_folder: a file that has changed": Mutation(
        OPENED_FOLDER, "if _state(status) != self.state:", "if False:", TEST_OPENED_FOLDER
    ),
    "opened_folder: a name that means another file": Mutation(
        OPENED_FOLDER,
        "os.stat(self._name, dir_fd=self._directory, follow_symlinks=False)",
        "os.fstat(self._descriptor)",
        TEST_OPENED_FOLDER,
    ),
    "opened_folder: new files are read once": Mutation(
        OPENED_FOLDER, "if self._is_new else []", "if False else []", TEST_OPENED_FOLDER
    ),
    "safetensors_file: holes": Mutation(
        SAFETENSORS_FILE, "if place.start != end:", "if False:", TEST_SAFETENSORS_FILE
    ),
    "safetensors_file: values of others are read": Mutation(
        SAFETENSORS_FILE, "runs[-1][1] == place.start", "True", TEST_DIFFUSERS_FILE
    ),
    "safetensors_file: no outline is shared": Mutation(
        SAFETENSORS_FILE,
        "shared = _OUTLINES.setdefault((fingerprint, meaning), outline(fingerprint))",
        "shared = outline(fingerprint)",
        TEST_OPENED_FOLDER,
    ),
    "peft_folder: another order is another config": Mutation(
        PEFT_FOLDER, "sorted(v) for n, v", "v for n, v", TEST_OPENED_FOLDER
    ),
}
