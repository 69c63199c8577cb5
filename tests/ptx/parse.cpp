// From the text of a PTX file to instructions.
#include <algorithm>
#include <fstream>
#include <regex>
#include <sstream>

#include "ptx.h"

namespace ptx {

namespace {

std::string trimmed(const std::string& text) {
    const size_t first = text.find_first_not_of(" \t\r\n");
    if (first == std::string::npos) return "";
    return text.substr(first, text.find_last_not_of(" \t\r\n") - first + 1);
}

// At the commas that are in no brackets.
std::vector<std::string> split(const std::string& text) {
    std::vector<std::string> parts;
    std::string part;
    int depth = 0;
    for (const char c : text) {
        depth += (c == '{' || c == '[') - (c == '}' || c == ']');
        if (c == ',' && depth == 0) {
            parts.push_back(trimmed(part));
            part.clear();
        } else {
            part += c;
        }
    }
    if (!trimmed(part).empty()) parts.push_back(trimmed(part));
    return parts;
}

Kernel parse_header(const std::string& name, const std::string& parameters,
                    const std::string& directives) {
    Kernel kernel;
    kernel.name = name;
    static const std::regex parameter(
        R"(\.param\s+(?:\.align\s+(\d+)\s+)?\.[busf](\d+)\s+([\w$]+)(?:\[(\d+)\])?)");
    for (const std::string& text : split(parameters)) {
        std::smatch found;
        if (!std::regex_match(text, found, parameter)) throw Error(name + ": parameter " + text);
        const size_t element = std::stoul(found[2]) / 8;
        const size_t size = element * (found[4].matched ? std::stoul(found[4]) : 1);
        const size_t align = found[1].matched ? std::stoul(found[1]) : element;
        const size_t offset = (kernel.parameter_bytes + align - 1) / align * align;
        kernel.parameters.push_back({found[3], size, offset});
        kernel.parameter_bytes = offset + size;
    }
    static const std::regex limits(R"(\s*\.maxntid\s+(\d+), 1, 1\s*(\.minnctapersm\s+\d+\s*)?)");
    std::smatch found;
    if (!std::regex_match(directives, found, limits)) throw Error(name + ": " + directives);
    kernel.most_threads = std::stoi(found[1]);
    return kernel;
}

class Decoder {
  public:
    Decoder(const Module& module, Kernel& kernel) : module_(module), kernel_(kernel) {
        for (const char* const name : kSpecial)
            scopes_.back()[name] = kernel_.registers++;
    }

    void decode() {
        line_ = kernel_.body_line;
        std::string statement;
        bool vector = false;
        for (const char c : kernel_.body) {
            line_ += c == '\n';
            const bool empty = trimmed(statement).empty();
            if (c == ';') {
                add(trimmed(statement));
                statement.clear();
            } else if (c == ':') {
                if (!labels_.emplace(trimmed(statement), kernel_.code.size()).second)
                    fail("two labels " + statement);
                statement.clear();
            } else if (c == '{' && empty) {
                scopes_.emplace_back();
            } else if (c == '}' && !vector) {
                if (!empty) fail("no end of " + statement);
                scopes_.pop_back();
            } else {
                vector = c == '{' || (vector && c != '}');
                statement += c;
            }
        }
        Instruction end;  // of a kernel that does not say `ret`
        end.flow = Instruction::kReturn;
        kernel_.code.push_back(end);
        for (const auto& [at, label] : jumps_) {
            if (!labels_.count(label)) fail("no label " + label);
            kernel_.code[at].target = labels_[label];
        }
    }

  private:
    [[noreturn]] void fail(const std::string& why) const {
        throw Error(kernel_.name + ": line " + std::to_string(line_) + ": " + why);
    }

    int find_register(const std::string& name) const {
        for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
            const auto found = scope->find(name);
            if (found != scope->end()) return found->second;
        }
        fail("no register " + name);
    }

    int constant(uint64_t value) {
        const auto [found, fresh] = kernel_.constants.emplace(value, kernel_.registers);
        kernel_.registers += fresh;
        return found->second;
    }

    // A register, a number, or the address of a parameter or of shared memory.
    int operand(const std::string& text) {
        static const std::regex number(R"(-?\d+U?|0[xX][0-9a-fA-F]+U?)");
        static const std::regex floating("0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})");
        std::smatch found;
        if (std::regex_match(text, number))
            return constant(text[0] == '-' ? uint64_t(std::stoll(text, nullptr, 0))
                                           : std::stoull(text, nullptr, 0));
        if (std::regex_match(text, found, floating))
            return constant(std::stoull(found[found[1].matched ? 1 : 2], nullptr, 16));
        for (const Parameter& parameter : kernel_.parameters)
            if (parameter.name == text) return constant(parameter.offset);
        for (const std::string& name : module_.shared)
            if (name == text) return constant(kSharedStart);
        return find_register(text);
    }

    void add_operand(Instruction& to, const std::string& text, bool result) {
        std::vector<int>& rows = result ? to.to : to.from;
        if (text[0] == '[') {
            const std::string inside = trimmed(text.substr(1, text.size() - 2));
            const size_t plus = inside.find('+');
            rows.push_back(operand(trimmed(inside.substr(0, plus))));
            to.offsets.push_back(plus == std::string::npos ? 0
                                                           : std::stoll(inside.substr(plus + 1)));
        } else if (text[0] == '{') {
            for (const std::string& part : split(text.substr(1, text.size() - 2)))
                rows.push_back(operand(part));
        } else if (const size_t bar = text.find('|'); result && bar != std::string::npos) {
            rows.push_back(operand(trimmed(text.substr(0, bar))));
            to.beside = operand(trimmed(text.substr(bar + 1)));
        } else {
            rows.push_back(operand(text));
        }
    }

    void add_directive(const std::string& text) {
        static const std::regex registers(R"(\.reg\s+\.\w+\s+([%\w$]+)(?:<(\d+)>)?)");
        static const std::regex ignored(R"(\.pragma\s+"nounroll")");
        std::smatch found;
        if (std::regex_match(text, ignored)) return;
        if (!std::regex_match(text, found, registers)) fail("directive " + text);
        if (!found[2].matched) scopes_.back()[found[1]] = kernel_.registers++;
        for (int i = 0; found[2].matched && i < std::stoi(found[2]); ++i)
            scopes_.back()[found[1].str() + std::to_string(i)] = kernel_.registers++;
    }

    void add(const std::string& text) {
        if (text[0] == '.') return add_directive(text);
        static const std::regex form(R"((?:@(!?)([%\w$]+)\s+)?([\w.:]+)([\s\S]*))");
        std::smatch found;
        if (!std::regex_match(text, found, form)) fail(text);
        Instruction made;
        made.line = line_;
        made.text = text;
        made.negated = found[1].length() > 0;
        if (found[2].matched) made.guard = find_register(found[2]);
        const std::string opcode = found[3];
        const std::vector<std::string> operands = split(found[4]);
        if (opcode == "bra" || (opcode == "bra.uni" && made.guard < 0)) {
            made.flow = Instruction::kBranch;
            jumps_.emplace_back(kernel_.code.size(), operands.at(0));
        } else if (opcode == "ret") {
            made.flow = Instruction::kReturn;
        } else if ((opcode == "bar.sync" || opcode == "barrier.sync") &&
                   operands == std::vector<std::string>{"0"}) {
            made.flow = Instruction::kBarrier;
            made.collective = true;
        } else {
            static const std::regex without_result(R"((st|cp|membar)\..*)");
            const bool result = !std::regex_match(opcode, without_result);
            for (size_t i = 0; i < operands.size(); ++i)
                add_operand(made, operands[i], result && i == 0);
            try {
                made.execute = find(opcode, made);
            } catch (const Error& error) {
                fail(error.what() + (" `" + text + "`"));
            }
        }
        kernel_.code.push_back(std::move(made));
    }

    const Module& module_;
    Kernel& kernel_;
    std::vector<std::map<std::string, int>> scopes_{1};
    std::map<std::string, int> labels_;
    std::vector<std::pair<size_t, std::string>> jumps_;
    int line_ = 0;
};

}  // namespace

Module::Module(const std::string& path) {
    std::ifstream file(path);
    if (!file) throw Error("cannot read " + path);
    std::string text;
    for (std::string line; std::getline(file, line);)
        text += line.substr(0, line.find("//")) + '\n';
    static const std::regex preamble(R"(\.(version|target|address_size)\s.*)");
    static const std::regex external(
        R"(\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\])");
    static const std::regex global(R"(\.global\s+\.align\s+\d+\s+\.b8\s+[\w$]+(\[\d+\])?)");
    static const std::regex entry(R"((?:\.visible\s+)?\.entry\s+([\w$]+)\(([^)]*)\)([^{]*))");
    for (size_t at = 0; (at = text.find_first_not_of(" \t\n", at)) != std::string::npos;) {
        const size_t end_of_line = text.find('\n', at);
        if (std::regex_match(text.substr(at, end_of_line - at), preamble)) {
            at = end_of_line;
            continue;
        }
        const size_t stop = text.find_first_of(";{", at);
        const std::string head = text.substr(at, stop - at);
        std::smatch found;
        if (std::regex_match(head, found, external)) {
            shared.push_back(found[1]);
        } else if (std::regex_match(head, found, entry)) {
            size_t end = stop + 1;
            for (int depth = 1; depth > 0; ++end)
                depth += (text.at(end) == '{') - (text.at(end) == '}');
            Kernel kernel = parse_header(found[1], found[2], found[3]);
            kernel.body = text.substr(stop + 1, end - stop - 2);
            kernel.body_line = 1 + int(std::count(text.begin(), text.begin() + stop, '\n'));
            kernels.emplace(kernel.name, kernel);
            at = end;
            continue;
        } else if (!std::regex_match(head, global)) {  // no kernel here reads one of these
            throw Error(path + ": " + head);
        }
        at = stop + 1;
    }
}

void decode(const Module& module, Kernel& kernel) {
    Kernel decoded = kernel;  // all of it, or nothing
    Decoder(module, decoded).decode();
    decoded.body.clear();
    kernel = std::move(decoded);
}

}  // namespace ptx
