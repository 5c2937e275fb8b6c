"""One line of this room, broken: each must turn one of the named tests red."""

from mutation import Mutation

BASE_MODEL = "checkpoints/base_model.py"
BESIDE_FACTORS = "checkpoints/beside_factors.py"
DIFFUSERS_FILE = "checkpoints/diffusers_file.py"
NEW_ADAPTER = "configs/new_adapter.py"
OPENED_FOLDER = "checkpoints/opened_folder.py"
PATTERNS = "configs/patterns.py"
PEFT_CONFIG = "configs/peft_config.py"
PEFT_FOLDER = "checkpoints/peft_folder.py"
PEFT_MODEL = "checkpoints/peft_model.py"
PEFT_WRITER = "checkpoints/peft_writer.py"
SAFETENSORS_FILE = "checkpoints/safetensors_file.py"
WRITTEN_CONFIG = "configs/written_config.py"
TEST_BASE_MODEL = ("checkpoints/test_base_model.py",)
TEST_BOUNDED = ("adapters/test_bounded.py",)
TEST_DIFFUSERS_FILE = ("checkpoints/test_diffusers_file.py",)
TEST_NEW_ADAPTER = ("configs/test_new_adapter.py",)
TEST_OPENED_FOLDER = ("checkpoints/test_opened_folder.py",)
TEST_PATTERNS = ("configs/test_patterns.py",)
TEST_PEFT_CONFIG = ("configs/test_peft_config.py",)
TEST_PEFT_FOLDER = ("checkpoints/test_peft_folder.py",)
TEST_PEFT_MODEL = ("checkpoints/test_peft_model.py",)
TEST_PEFT_WRITER = ("checkpoints/test_peft_writer.py",)
TEST_SAFETENSORS_FILE = ("checkpoints/test_safetensors_file.py",)
TEST_OTHER_FACTORS = ("model/test_other_factors.py",)
TEST_ATTACH_PEFT = ("model/test_attach_peft.py",)
MUTATIONS = {
    "copies: a tied head keeps its tokens": Mutation(
        BESIDE_FACTORS,
        "sharing = {*base.with_its_tokens(path)} & {*base.targets, path}",
        "sharing = {path}",
        TEST_OTHER_FACTORS,
    ),
    "peft folder: blocks of A side by side": Mutation(
        PEFT_FOLDER,
        "A = on_diagonal(A, blocks)",
        "A = A.repeat(1, blocks)",
        TEST_OTHER_FACTORS,
    ),
    "peft_model: any scaling": Mutation(
        PEFT_MODEL, "    check_number(now, what, CheckpointError)\n", "", TEST_PEFT_MODEL
    ),
    "peft_model: the switch of no layer": Mutation(
        PEFT_MODEL, "0 if layer.disable_adapters else", "", TEST_ATTACH_PEFT
    ),
    "peft_model: DoRA on a running sum": Mutation(
        PEFT_MODEL, "for name in active[1:]:", "for name in ():", ("model/test_dora.py",)
    ),
    "peft_model: a scale is baked in": Mutation(
        PEFT_MODEL,
        "return LoraWeights(A, B, trained, bias)",
        "return LoraWeights(A, B, now, bias)",
        TEST_ATTACH_PEFT,
    ),
    "peft_model: layers of any class": Mutation(
        PEFT_MODEL, 'startswith("peft.")', 'startswith("")', TEST_ATTACH_PEFT
    ),
    "peft_model: a failure leaves PEFT's layers out": Mutation(
        PEFT_MODEL, "live.base.set_submodule(path, layer)\n", "pass\n", TEST_ATTACH_PEFT
    ),
    "peft_model: a model that believes to have adapters": Mutation(
        PEFT_MODEL, "_hf_peft_config_loaded = False", "_x = 0", TEST_ATTACH_PEFT
    ),
    "base model: a name of the model's own is changed": Mutation(
        BASE_MODEL, "if plain in known or not known", "if not known", TEST_BASE_MODEL
    ),
    "base model: transformers' tables are not asked": Mutation(
        BASE_MODEL, "        if renamings:\n", "        if False:\n", TEST_BASE_MODEL
    ),
    "base model: all patterns count": Mutation(
        BASE_MODEL,
        "            if count:\n                return prefix + changed",
        "            rest = changed",
        TEST_BASE_MODEL,
    ),
    "peft folder: any copy of the base": Mutation(
        BESIDE_FACTORS, "_equal(copy, own)", "True", TEST_BASE_MODEL
    ),
    "peft folder: a shift is scaled": Mutation(
        PEFT_FOLDER, "shift / part.scaling", "shift", TEST_BASE_MODEL
    ),
    "diffusers file: sizes tell nothing": Mutation(
        DIFFUSERS_FILE, "if fitting.get(p)}", "}", TEST_DIFFUSERS_FILE
    ),
    "diffusers file: a rank for all": Mutation(
        DIFFUSERS_FILE,
        "Strength(self.ranks[path], 1.0)",
        "Strength(self.r, 1.0)",
        TEST_DIFFUSERS_FILE,
    ),
    "diffusers file: no metadata": Mutation(
        DIFFUSERS_FILE, "if own else", "if not own else", TEST_DIFFUSERS_FILE
    ),
    "patterns: a run has holes": Mutation(
        PATTERNS,
        "return after | (((after & runs) + runs) ^ runs)",
        "return after | ((after & runs) << 1)",
        TEST_PATTERNS,
    ),
    "patterns: a lookahead that takes what it sees": Mutation(
        PATTERNS,
        "found = self.part.before(path, path.everywhere)",
        "found = self.part.before(path, after)",
        TEST_PATTERNS,
    ),
    "patterns: a dot is only a dot": Mutation(
        PATTERNS,
        "texts = tuple([text[start + a : start + b] for a, b in shape.spans])",
        'texts = tuple(text[start:].split("."))',
        TEST_PATTERNS,
    ),
    "patterns: steps without end": Mutation(
        PATTERNS, "if self.left < 0:", "if False:", TEST_PATTERNS
    ),
    "patterns: ends are found anywhere": Mutation(
        PATTERNS, "if not (start and shape.whole):", "if True:", TEST_PATTERNS
    ),
    "peft_config: the last number is the layer": Mutation(
        PEFT_CONFIG, "for number in numbers:", "for number in numbers[::-1]:", TEST_PEFT_CONFIG
    ),
    "peft_config: ints of any length": Mutation(
        PEFT_CONFIG, "if len(digits) > MAX_DIGITS:", "if False:", TEST_PEFT_CONFIG
    ),
    "peft_config: the last of two names counts": Mutation(
        PEFT_CONFIG, "if name in values:", "if False:", TEST_PEFT_CONFIG
    ),
    "errors: warnings that are kept": Mutation(
        "errors.py",
        'frame.f_globals.get("__name__"),\n    )',
        'frame.f_globals.get("__name__"),\n'
        '        frame.f_globals.setdefault("__warningregistry__", {}),\n    )',
        ("test_errors.py",),
    ),
    "errors: lines of any number": Mutation(
        "errors.py", "if text.isprintable():", "if True:", ("test_errors.py",)
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
        OPENED_FOLDER, "or not self._is_snapshot(blob[1])", "", TEST_PEFT_FOLDER
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
        "shared = _OUTLINES.setdefault((fingerprint, meaning), make(fingerprint))",
        "shared = make(fingerprint)",
        TEST_OPENED_FOLDER,
    ),
    "peft_folder: another order is another config": Mutation(
        PEFT_FOLDER, "sorted(v) for n, v", "v for n, v", TEST_OPENED_FOLDER
    ),
    "peft_writer: the old config stays beside other weights": Mutation(
        PEFT_WRITER,
        "        for name in there:\n",
        "        for name in there[1:]:\n",
        TEST_PEFT_WRITER,
    ),
    "peft_writer: the config comes first": Mutation(
        PEFT_WRITER,
        "        for name in (WEIGHTS_FILE, CONFIG_FILE):\n            os.replace(spare",
        "        for name in (CONFIG_FILE, WEIGHTS_FILE):\n            os.replace(spare",
        TEST_PEFT_WRITER,
    ),
    "peft_writer: nothing is put back": Mutation(
        PEFT_WRITER, "os.replace(old / name, place / name)", "pass", TEST_PEFT_WRITER
    ),
    "peft_writer: half a new checkpoint stays": Mutation(
        PEFT_WRITER, "elif name not in there:", "elif False:", TEST_PEFT_WRITER
    ),
    "peft_writer: what was there is taken for ours": Mutation(
        PEFT_WRITER, "elif name not in there:", "else:", TEST_PEFT_WRITER
    ),
    "peft_writer: interrupts are no failures": Mutation(
        PEFT_WRITER, "    except BaseException:", "    except Exception:", TEST_PEFT_WRITER
    ),
    "peft_writer: the same config is moved as well": Mutation(
        PEFT_WRITER, "if len(there) == 2 and _holds", "if False and _holds", TEST_PEFT_WRITER
    ),
    "peft_writer: any config is the same": Mutation(
        PEFT_WRITER,
        "if len(there) == 2 and _holds(place / CONFIG_FILE, config)",
        "if len(there) == 2",
        TEST_PEFT_WRITER,
    ),
    "peft_writer: nobody waits for the disk": Mutation(
        PEFT_WRITER, "    os.fsync(file.fileno())\n", "", TEST_PEFT_WRITER
    ),
    "peft_writer: links are followed": Mutation(
        PEFT_WRITER, "if os.path.lexists(place / name)]", "if False]", TEST_PEFT_WRITER
    ),
    "peft_writer: new folders stay": Mutation(
        PEFT_WRITER, "                path.rmdir()\n", "                pass\n", TEST_PEFT_WRITER
    ),
    "peft_writer: some layers lack a bias": Mutation(
        PEFT_WRITER, "if biased and part.bias is None:", "if False:", TEST_PEFT_WRITER
    ),
    "peft_writer: a gain is forgotten": Mutation(
        PEFT_WRITER, "if part.gain is not None:", "if False:", TEST_PEFT_WRITER
    ),
    "peft_writer: NaN is written": Mutation(
        PEFT_WRITER, "if not is_finite(tensor, tensor.dtype):", "if False:", TEST_PEFT_WRITER
    ),
    "safetensors: dtypes in any order": Mutation(
        SAFETENSORS_FILE,
        "key=lambda key: (order.index(tensors[key].dtype), key)",
        "key=str",
        TEST_PEFT_WRITER,
    ),
    "safetensors: values that are not aligned": Mutation(
        SAFETENSORS_FILE, 'header += b" " *', 'header += b"" *', TEST_PEFT_WRITER
    ),
    "safetensors: strided as they lie": Mutation(
        SAFETENSORS_FILE, ".detach().cpu().contiguous()", ".detach().cpu().T", TEST_PEFT_WRITER
    ),
    "written_config: patterns are plain": Mutation(
        WRITTEN_CONFIG, "if not _means(found, wanted):", "if False:", TEST_PEFT_WRITER
    ),
    "written_config: patterns are exact": Mutation(
        WRITTEN_CONFIG, "if not _means(found, wanted):", "if True:", TEST_PEFT_WRITER
    ),
    "written_config: patterns of any place": Mutation(
        WRITTEN_CONFIG, 'f"^{re.escape(path)}"', "re.escape(path)", TEST_PEFT_WRITER
    ),
    "written_config: patterns that are programs": Mutation(
        WRITTEN_CONFIG, 'f"^{re.escape(path)}"', 'f"^{path}"', TEST_PEFT_WRITER
    ),
    "written_config: only broken numbers": Mutation(
        WRITTEN_CONFIG,
        "round(near) if round(near) / divisor == strength.scaling else near",
        "near",
        TEST_PEFT_WRITER,
    ),
    "written_config: never rslora": Mutation(
        WRITTEN_CONFIG,
        "use_rslora = min((False, True)",
        "use_rslora = min((False,)",
        TEST_PEFT_WRITER,
    ),
    "written_config: always rslora": Mutation(
        WRITTEN_CONFIG,
        "use_rslora = min((False, True)",
        "use_rslora = min((True, False)",
        TEST_PEFT_WRITER,
    ),
    "written_config: the first pair": Mutation(
        WRITTEN_CONFIG, "pairs.most_common(1)[0]", "next(iter(pairs.items()))", TEST_PEFT_WRITER
    ),
    "written_config: last names always": Mutation(
        WRITTEN_CONFIG, "path if _last(path) in others else", "", TEST_PEFT_WRITER
    ),
    "written_config: last names never": Mutation(
        WRITTEN_CONFIG, "if _last(path) in others else _last(path)", "", TEST_PEFT_WRITER
    ),
    "written_config: names that mean too much": Mutation(
        WRITTEN_CONFIG, "if config.targeted(known) == {*paths}:", "if True:", TEST_PEFT_WRITER
    ),
    "new_adapter: the wrong draw": Mutation(
        NEW_ADAPTER, "    draw(out_features, r)\n", "", TEST_NEW_ADAPTER
    ),
    "new_adapter: drawn in the default dtype": Mutation(
        NEW_ADAPTER,
        "dtype=torch.float32, device=generator.device",
        "device=generator.device",
        TEST_NEW_ADAPTER,
    ),
    "new_adapter: another bound": Mutation(NEW_ADAPTER, "a=math.sqrt(5)", "a=0", TEST_NEW_ADAPTER),
    "new_adapter: B is drawn": Mutation(
        NEW_ADAPTER, "torch.zeros(out_features, r,", "torch.ones(out_features, r,", TEST_NEW_ADAPTER
    ),
    "new_adapter: names of nothing": Mutation(
        NEW_ADAPTER, "        if missing:\n", "        if False:\n", TEST_NEW_ADAPTER
    ),
    "new_adapter: no layer": Mutation(
        NEW_ADAPTER, "    if not chosen:\n", "    if False:\n", TEST_NEW_ADAPTER
    ),
    "new_adapter: patterns of nothing": Mutation(
        NEW_ADAPTER, "if not any(alone[path] for path in paths):", "if False:", TEST_NEW_ADAPTER
    ),
    "new_adapter: patterns behind others are mistakes": Mutation(
        NEW_ADAPTER, "if not any(alone[path] for path in paths):", "if True:", TEST_NEW_ADAPTER
    ),
    "new_adapter: rslora is forgotten": Mutation(
        NEW_ADAPTER, "use_rslora=bool(use_rslora),", "", TEST_NEW_ADAPTER
    ),
}
