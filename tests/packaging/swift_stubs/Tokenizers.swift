// Stand-ins for what the packages' Swift code uses of swift-transformers 1.x (module Tokenizers).
import Foundation

public typealias Message = [String: any Sendable]

public protocol Tokenizer: Sendable {
    func encode(text: String) -> [Int]
    func encode(text: String, addSpecialTokens: Bool) -> [Int]
    func decode(tokens: [Int]) -> String
    func applyChatTemplate(messages: [Message]) throws -> [Int]
}

public enum AutoTokenizer {
    public static func from(modelFolder: URL, strict: Bool = true) async throws -> any Tokenizer {
        fatalError("a stand-in")
    }
}
